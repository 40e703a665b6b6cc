"""The perceptual distance of a reconstruction: LPIPS from local weights, or a substitute."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hunyuan_train.objectives.gabor_pyramid import GaborPyramid
from hunyuan_train.objectives.lpips import Lpips, load_lpips

CHUNK_PX = 2**19
"""Pixels of the frames that are compared at once: 8 of 256 x 256, one of 720 x 1280."""


class Perceptual(Protocol):
    """A distance of clips that follows what viewers notice."""

    @property
    def name(self) -> str:
        """What metrics and reports call it: "lpips-alex", "lpips-vgg" or "gabor-pyramid"."""
        ...

    def describe(self) -> str:
        """Return one sentence for the log of a run."""
        ...

    def __call__(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """Return [B] float32, the mean over frames, of clips [B, 3, F, H, W] in [-1, 1]."""
        ...


class FrameDistance:
    """A distance of pictures, averaged over the frames of a clip in chunks.

    A chunk's gradient is computed with its value, so that one chunk's features and one gradient as
    large as the clip are all the memory it takes. There is no second derivative.

    Args:
        network: Pictures [N, 3, H, W] twice to distances [N], differentiable in the first.
        name: Of the distance.
        description: A sentence about it.
        chunk_px: Pixels of the frames that are compared at once.
    """

    def __init__(
        self, network: nn.Module, name: str, description: str, chunk_px: int = CHUNK_PX
    ) -> None:
        self.network = network.requires_grad_(False).eval()
        self.name = name
        self._description = description
        self._chunk_px = chunk_px

    def describe(self) -> str:
        """Return one sentence for the log of a run."""
        return self._description

    def __call__(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """Return the mean distance of the frames of every clip.

        Args:
            decoded: [B, 3, F, H, W] near [-1, 1]; the result is differentiable in it.
            pixels: [B, 3, F, H, W] in [-1, 1].

        Returns:
            [B], float32.

        Raises:
            ValueError: the frames are too small for the network.
        """
        assert decoded.shape == pixels.shape, (decoded.shape, pixels.shape)
        batch, frames = decoded.shape[0], decoded.shape[2]
        # The squares of small differences drown in narrower types.
        with torch.autocast(decoded.device.type, enabled=False):
            distances = _InChunks.apply(
                _frames(decoded), _frames(pixels), self.network, self._chunk_px
            )
        assert isinstance(distances, Tensor)
        return distances.view(batch, frames).mean(dim=1)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, decoded: Tensor, pixels: Tensor, network: nn.Module, chunk_px: int
    ) -> Tensor:
        rows = max(1, chunk_px // (pixels.shape[2] * pixels.shape[3]))
        wanted = ctx.needs_input_grad[0]
        values, slopes = [], []
        for mine, other in zip(decoded.split(rows), pixels.split(rows), strict=True):
            with torch.set_grad_enabled(wanted):
                mine = mine.detach().requires_grad_(wanted)
                value = network(mine, other)
                if wanted:
                    slopes += torch.autograd.grad(value.sum(), mine)
            values.append(value.detach())
        if wanted:
            ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return slope * weight.view(-1, 1, 1, 1), None, None, None


def build_perceptual(folder: str, device: torch.device | str) -> FrameDistance:
    """Return LPIPS with the weights in ``folder``, or without a folder the substitute.

    Args:
        folder: See :func:`~hunyuan_train.objectives.lpips.load_lpips`; empty for gabor-pyramid.
        device: Where clips will be compared.

    Raises:
        ValueError: the folder or a file in it does not fit.
    """
    if not folder:
        return FrameDistance(
            GaborPyramid().to(device),
            "gabor-pyramid",
            "perceptual distance gabor-pyramid: fixed oriented filters, not LPIPS "
            "(vae_loss.perceptual_folder is empty)",
        )
    network: Lpips = load_lpips(folder)
    return FrameDistance(
        network.to(device),
        f"lpips-{network.kind}",
        f"perceptual distance LPIPS with {network.backbone.title} from {folder}",
    )


def _frames(clips: Tensor) -> Tensor:
    # [B, 3, F, H, W] to [B * F, 3, H, W].
    return clips.float().transpose(1, 2).flatten(0, 1)

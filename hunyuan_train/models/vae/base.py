"""What every VAE does: encode, decode, scale, whole or in tiles or as a stream."""

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Protocol, Self, TypeAlias

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from hunyuan_train.models.shapes import Latents, PerSample
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.tile_work import TileWork
from hunyuan_train.models.vae.tiling import Tiling, tiled, tiled_stream

Pixels: TypeAlias = Float[Tensor, "B colours frames height width"]
Frames: TypeAlias = Shaped[Tensor, "B colours frames height width"]

MIN_LOGVAR, MAX_LOGVAR = -30.0, 20.0
INITIAL_LOGVAR = -6.0


@dataclass(frozen=True, slots=True)
class Posterior:
    """A normal distribution per latent value, unscaled."""

    mean: Tensor
    """[B, C, T, h, w]."""

    std: Tensor
    """[B, C, T, h, w], positive."""

    @classmethod
    def from_moments(cls, moments: Tensor) -> "Posterior":
        """Return the posterior of mean and log-variance, joined along the channels."""
        mean, logvar = moments.chunk(2, dim=1)
        return cls(mean, torch.exp(0.5 * logvar.clamp(MIN_LOGVAR, MAX_LOGVAR)))

    @property
    def logvar(self) -> Tensor:
        """Return the log of the variance, [B, C, T, h, w]."""
        return 2 * self.std.log()

    def mode(self) -> Tensor:
        """Return the most likely latents."""
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:
        """Return the latents that standard normal ``noise`` of the same shape selects."""
        return self.mean + self.std * noise

    def kl(self) -> PerSample:
        """Return KL(posterior || N(0, 1)) in nats, summed over channels, time, height and width."""
        per_value = 0.5 * (self.mean.square() + self.std.square() - 1 - self.logvar)
        return per_value.flatten(1).sum(dim=1)


class Split(Protocol):
    """Ranks that compute one clip together; see ``parallel.vae_split``."""

    def reconstruct(self, pixels: Pixels, noise: Latents) -> tuple[Pixels, Latents, Latents]:
        """Return reconstruction, mean and std of whole clips, on every rank."""
        ...


class Vae(nn.Module):
    """4n+1 frames of H x W pixels to n+1 latent frames of H/r x W/r, r = ``cfg.spatial_ratio``.

    ``encode`` and ``decode`` speak unscaled latents; ``scale`` and ``unscale`` go to and from the
    unit variance that diffusion works in.
    """

    def __init__(self, cfg: VaeConfig) -> None:
        """Keep the config; tiles run one by one until ``work`` says otherwise."""
        super().__init__()
        self.cfg = cfg
        self.work = TileWork()
        self.split: Split | None = None

    @abstractmethod
    def init_weights(self) -> None:
        """Initialise every parameter, also after construction on the meta device."""

    @abstractmethod
    def encode_tile(self, pixels: Tensor) -> Tensor:
        """Return mean and log-variance of pixels that are not cut further."""

    @abstractmethod
    def decode_tile(self, latents: Tensor) -> Tensor:
        """Return pixels of latents that are not cut further."""

    def forward(
        self, pixels: Pixels, noise: Latents, *, tiles: bool = False, compare: bool = False
    ) -> tuple[Pixels, Latents, Latents, Pixels | None]:
        """Return the reconstruction from the latents that ``noise`` selects, with mean and std.

        Args:
            pixels: As :meth:`encode` takes them.
            noise: Standard normal, of the latents' shape; zeros select the mean.
            tiles: Whether to work in the tiles of the config, and not whole.
            compare: Whether to return, last, what the whole reconstructs; it has no graph.
        """
        if self.split is not None:
            with self.tiling(on=False):
                return (*self.split.reconstruct(pixels, noise), None)
        whole = None
        if compare:
            with torch.no_grad(), self.tiling(on=False):
                whole = self.decode(self.encode(pixels).sample(noise))
        with self.tiling(on=tiles):
            posterior = self.encode(pixels)
            decoded = self.decode(posterior.sample(noise))
        return decoded, posterior.mean, posterior.std, whole

    @contextmanager
    def tiling(self, *, on: bool) -> Iterator[None]:
        """Work in the tiles of the config, or whole, inside a ``with`` block."""
        kept = self.cfg
        if not on:
            self.cfg = replace(kept, tile_spatial=False, tile_temporal=False)
        try:
            yield
        finally:
            self.cfg = kept

    def encode(self, pixels: Pixels) -> Posterior:
        """Return the posterior of unscaled latents.

        Args:
            pixels: [B, 3, 4n+1, H, W] in [-1, 1], H and W multiples of the spatial ratio.

        Returns:
            Mean and standard deviation, each [B, latent_channels, n+1, H/8, W/8] (16 for vae_hy15).

        Raises:
            ValueError: If the number of channels, frames, the height or the width does not fit.
        """
        check_pixels(pixels.shape, self.cfg)
        tiling = Tiling.for_encode(self.cfg)
        return Posterior.from_moments(tiled(self.encode_tile, pixels, tiling, self.work))

    def decode(self, latents: Latents) -> Pixels:
        """Return pixels near [-1, 1] for unscaled latents.

        Args:
            latents: [B, latent_channels, n+1, h, w], unscaled.

        Returns:
            [B, 3, 4n+1, 8h, 8w], or 16h and 16w for vae_hy15.

        Raises:
            ValueError: If the tensor is not a latent video of this VAE.
        """
        self._check_latents(latents)
        return tiled(self.decode_tile, latents, Tiling.for_decode(self.cfg), self.work)

    def encode_stream(self, pieces: Iterable[Frames]) -> Iterator[Posterior]:
        """Yield the posterior of ``encode`` for a clip of any length, one time tile at a time.

        The values are those of ``encode``; memory does not grow with the clip.

        Args:
            pieces: [B, 3, any number of frames, H, W], in [-1, 1] or bytes, on any device: tiles
                are moved and converted one by one. All together have 4n+1 frames.

        Raises:
            ValueError: If the sizes do not fit, or the config has no time tiles.
        """
        self._check_streams()
        first, pieces = _peek(pieces)
        if first is None:
            return
        check_pixels(torch.Size((*first.shape[:2], 1, *first.shape[3:])), self.cfg)
        tiling, count = Tiling.for_encode(self.cfg), 0

        def counted() -> Iterator[Tensor]:
            nonlocal count
            for piece in pieces:
                count += piece.shape[2]
                yield piece
            check_pixels(torch.Size((*first.shape[:2], count, *first.shape[3:])), self.cfg)

        def encode_frames(tile: Tensor) -> Tensor:
            return self.encode_tile(self._moved(tile))

        for moments in tiled_stream(encode_frames, counted(), tiling, self.work):
            yield Posterior.from_moments(moments)

    def decode_stream(self, pieces: Iterable[Latents]) -> Iterator[Pixels]:
        """Yield the pixels of ``decode`` for latents of any length, one time tile at a time.

        Args:
            pieces: Unscaled [B, latent_channels, any number of frames, h, w], on any device.

        Raises:
            ValueError: If the latents are not of this VAE, or the config has no time tiles.
        """
        self._check_streams()
        first, pieces = _peek(pieces)
        if first is None:
            return
        self._check_latents(first)
        tiling = Tiling.for_decode(self.cfg)

        def decode_moved(tile: Tensor) -> Tensor:
            return self.decode_tile(self._moved(tile))

        yield from tiled_stream(decode_moved, pieces, tiling, self.work)

    def scale(self, latents: Latents) -> Latents:
        """Return latents with a standard deviation near 1, as the transformer sees them."""
        return latents * self.cfg.scaling_factor

    def unscale(self, latents: Latents) -> Latents:
        """Return latents as ``decode`` takes them."""
        return latents / self.cfg.scaling_factor

    def channels_last(self) -> Self:
        """Store kernels the way a CPU reads them: 10 to 40 % faster, the same values."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
        return self

    def _moved(self, tile: Tensor) -> Tensor:
        parameter = next(self.parameters())
        moved = tile.to(parameter.device)
        if moved.dtype == torch.uint8:
            moved = moved.float().div_(127.5).sub_(1.0)
        return moved.to(parameter.dtype)

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[1] != self.cfg.latent_channels:
            raise ValueError(
                f"latents of shape {list(latents.shape)} cannot be decoded; give "
                f"[batch, {self.cfg.latent_channels}, frames, height, width]"
            )

    def _check_streams(self) -> None:
        if not self.cfg.tile_temporal:
            raise ValueError(
                f"a {self.cfg.kind} with vae.tile_temporal=false takes whole clips, not a stream: "
                "its attention looks back to the first frame, so its memory grows with the clip; "
                "use a vae_884 with vae.tile_temporal=true, or cut the clip"
            )


def check_pixels(shape: torch.Size, cfg: VaeConfig) -> None:
    """Raise ValueError, with the nearest legal values, unless the shape can be encoded."""
    if len(shape) != 5 or shape[1] != cfg.in_channels:
        raise ValueError(
            f"pixels of shape {list(shape)} cannot be encoded; give "
            f"[batch, {cfg.in_channels}, frames, height, width]"
        )
    frames, height, width = shape[2:]
    pace, ratio = cfg.temporal_ratio, cfg.spatial_ratio
    if frames % pace != 1:
        lower = max(1, (frames - 1) // pace * pace + 1)
        raise ValueError(
            f"a video of {frames} frames cannot be encoded; the number of frames must be "
            f"{pace}n+1, nearest are {lower} and {lower + pace}"
        )
    for name, size in (("height", height), ("width", width)):
        if size % ratio or size == 0:
            lower = max(ratio, size // ratio * ratio)
            raise ValueError(
                f"a {name} of {size} px cannot be encoded; it must be a multiple of "
                f"{ratio}, nearest are {lower} and {lower + ratio}"
            )


def _peek(pieces: Iterable[Tensor]) -> tuple[Tensor | None, Iterator[Tensor]]:
    iterator = iter(pieces)
    first = next(iterator, None)
    return first, iterator if first is None else chain([first], iterator)

"""The VAE as an encoding service: pixels in, posterior mean and standard deviation out."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class PosteriorLike(Protocol):
    """The part of a VAE posterior that is stored."""

    @property
    def mean(self) -> Tensor:
        """[B, C, T, h, w], unscaled."""
        ...

    @property
    def std(self) -> Tensor:
        """[B, C, T, h, w], positive."""
        ...


class VideoVae(Protocol):
    """What the service needs of a VAE; every ``Vae`` is one."""

    def encode(self, pixels: Tensor) -> PosteriorLike:
        """Return the posterior of pixels [B, 3, F, H, W] in [-1, 1]."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the named weights."""
        ...


class LatentEncoder:
    """Encodes pixels with a frozen VAE and knows the fingerprint of its weights.

    Args:
        vae: The VAE, already on ``device``; its gradients are not used.
        device: Where pixels are sent, as bytes, and encoded.
        dtype: Number format the VAE gets; that of the VAE's weights.
        scaling_factor: What the VAE's latents are multiplied with before the diffusion model.
    """

    def __init__(
        self,
        vae: VideoVae,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        scaling_factor: float = 1.0,
    ) -> None:
        self._vae = vae
        self._device = torch.device(device)
        self.dtype = dtype
        self.scaling_factor = scaling_factor
        # The config holds what the weights do not show, such as the tiling.
        salt = f"{getattr(vae, 'cfg', '')}\0{dtype}"
        self.fingerprint = weights_fingerprint(vae.state_dict(), salt)

    @torch.no_grad()
    def encode(self, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Encode clips of one shape, uint8 [F, H, W, 3].

        Returns:
            Unscaled posterior mean and standard deviation, float32 [B, C, T, h, w] on the CPU.
        """
        pixels = to_model_range(clips, self._device).to(self.dtype)
        posterior = self._vae.encode(pixels)
        return posterior.mean.float().cpu(), posterior.std.float().cpu()


def to_model_range(clips: Sequence[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """Return uint8 clips [F, H, W, 3] of one shape as float32 [B, 3, F, H, W] in [-1, 1]."""
    stacked = torch.stack([torch.from_numpy(clip).to(device) for clip in clips])
    return stacked.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def weights_fingerprint(weights: dict[str, Tensor], salt: str = "") -> str:
    """Hash names, shapes, dtypes and bytes of ``weights`` (SHA-256, 16 hex digits).

    A 246M-parameter VAE takes about a second, once per run.
    """
    digest = hashlib.sha256(salt.encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"\0{name}\0{tensor.dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]

"""How well an autoencoder gives back its input: scores of images and videos, and pictures of both.

Pixels are in [-1, 1] and not rounded; reconstructions are cut to that range first. A frame's score
is averaged over the frames of a sample, and these over samples, in float64.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from hunyuan_train.evaluation.video import even_frames, to_uint8
from hunyuan_train.objectives.perceptual import Perceptual

PEAK = 2.0
"""Largest difference of two pixel values."""
MAX_PSNR_DB = 100.0
"""Score of a frame without error, so that means stay finite."""
WINDOW_PX = 11
WINDOW_DEVIATION_PX = 1.5
K1, K2 = 0.01, 0.03
ERROR_GAIN = 5
"""Factor of the errors that :func:`compare_grid` shows."""
MEDIA = ("image", "video")
_COUNTS = ("samples", "values", "perceived")
_TERMS = ("squared_error", "psnr_db", "ssim", "flicker", "perceptual")
_SUMS = [f"{medium}/{name}" for medium in MEDIA for name in _COUNTS + _TERMS]


def psnr_db(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of clips [B, 3, F, H, W], the mean over frames.

    Returns:
        [B] float64, in dB with a peak of 2; at most MAX_PSNR_DB a frame.
    """
    error = (decoded.clamp(-1, 1).double() - pixels.double()).square().mean(dim=(1, 3, 4))
    least = PEAK**2 / 10 ** (MAX_PSNR_DB / 10)
    return (10 * torch.log10(PEAK**2 / error.clamp(min=least))).mean(dim=1)


def ssim(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the structural similarity of clips [B, 3, F, H, W], the mean over colours and frames.

    Wang et al. 2004: a Gaussian window of 11 px with a deviation of 1.5, K1 = 0.01, K2 = 0.03, and
    positions where it fits whole. Frames smaller than that take the largest odd window that fits.

    Returns:
        [B] float64, 1 for equal clips.
    """
    window = _window(min(WINDOW_PX, *decoded.shape[3:]), decoded.device)
    mine, other = decoded.clamp(-1, 1).double(), pixels.double()
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    # Local moments of a frame at a time: the float64 maps of a long clip would not fit.
    total = torch.zeros(len(decoded), dtype=torch.float64, device=decoded.device)
    for x, y in zip(mine.unbind(dim=2), other.unbind(dim=2), strict=True):
        mean_x, mean_y = _smooth(x, window), _smooth(y, window)
        var_x = _smooth(x * x, window) - mean_x * mean_x
        var_y = _smooth(y * y, window) - mean_y * mean_y
        covariance = _smooth(x * y, window) - mean_x * mean_y
        alike = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
        alike = alike / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))
        total += alike.flatten(1).mean(dim=1)
    return total / decoded.shape[2]


def flicker(decoded: Tensor, pixels: Tensor) -> Tensor:
    """Return the mean absolute error of the change from frame to frame, [B] float64; F >= 2.

    It is 0 for a reconstruction that is wrong in the same way all the time.
    """
    error = decoded.clamp(-1, 1).double() - pixels.double()
    return error.diff(dim=2).abs().flatten(1).mean(dim=1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Means over the samples of one medium."""

    samples: int
    """Images or clips."""
    psnr_db: float
    """Mean over samples of the mean over frames."""
    pooled_psnr_db: float
    """Of the mean squared error over all pixel values: what training quotes while it runs."""
    ssim: float
    """At most 1."""
    perceptual: float
    """Mean distance, NaN without one; of what kind, the perceptual's name says."""
    flicker: float
    """Mean absolute error of the change between frames; NaN for images."""


@dataclass(slots=True)
class ReconstructionScores:
    """Adds up the scores of batches, images and videos apart; sums merge over ranks by addition."""

    perceptual: Perceptual | None = None
    """Distance that is measured too."""
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    """Everything that was added up: "image/samples", "video/ssim"... Same keys on every rank."""

    @torch.no_grad()
    def add(self, decoded: Tensor, pixels: Tensor) -> None:
        """Take a batch of clips [B, 3, F, H, W] in [-1, 1] in; F = 1 counts as images."""
        assert decoded.shape == pixels.shape, (decoded.shape, pixels.shape)
        decoded = decoded.clamp(-1, 1)
        medium = MEDIA[pixels.shape[2] > 1]
        squared = (decoded.double() - pixels.double()).square()
        new = {
            "samples": float(len(pixels)),
            "values": float(pixels.numel()),
            "squared_error": squared.sum().item(),
            "psnr_db": psnr_db(decoded, pixels).sum().item(),
            "ssim": ssim(decoded, pixels).sum().item(),
        }
        if medium == "video":
            new["flicker"] = flicker(decoded, pixels).sum().item()
        if self.perceptual is not None:
            new["perceptual"] = self.perceptual(decoded, pixels).double().sum().item()
            new["perceived"] = float(len(pixels))
        for name, value in new.items():
            self.sums[f"{medium}/{name}"] += value

    def merge(self, other: Mapping[str, float]) -> None:
        """Add the sums of another rank."""
        for name in self.sums:
            self.sums[name] += other[name]

    def scores(self) -> dict[str, Scores]:
        """Return the means by medium, "image" and "video"; one without samples is left out."""
        return {medium: self._means(medium) for medium in MEDIA if self.sums[f"{medium}/samples"]}

    def _means(self, medium: str) -> Scores:
        samples = self.sums[f"{medium}/samples"]
        perceived = self.sums[f"{medium}/perceived"]
        least = PEAK**2 / 10 ** (MAX_PSNR_DB / 10)
        error = max(self.sums[f"{medium}/squared_error"] / self.sums[f"{medium}/values"], least)
        return Scores(
            samples=round(samples),
            psnr_db=self.sums[f"{medium}/psnr_db"] / samples,
            pooled_psnr_db=10 * math.log10(PEAK**2 / error),
            ssim=self.sums[f"{medium}/ssim"] / samples,
            perceptual=self.sums[f"{medium}/perceptual"] / perceived if perceived else math.nan,
            flicker=self.sums[f"{medium}/flicker"] / samples if medium == "video" else math.nan,
        )


def compare_grid(decoded: Tensor, pixels: Tensor, columns: int = 6) -> np.ndarray:
    """Return one picture of a clip: original, reconstruction and their difference, row by row.

    Args:
        decoded: [3, F, H, W] near [-1, 1].
        pixels: [3, F, H, W] in [-1, 1].
        columns: Evenly spaced frames that are shown, at most.

    Returns:
        RGB uint8 [3 * H, columns * W, 3]. The last row is grey where nothing differs; errors are
        shown ERROR_GAIN times as large, brighter where the reconstruction is too bright.
    """
    assert decoded.shape == pixels.shape, (decoded.shape, pixels.shape)
    decoded = decoded.clamp(-1, 1).float()
    rows = (pixels.float(), decoded, ERROR_GAIN * (decoded - pixels.float()))
    bands = [np.concatenate(to_uint8(even_frames(row, columns)), axis=1) for row in rows]
    return np.concatenate(bands, axis=0)


def write_compare_grid(path: Path | str, decoded: Tensor, pixels: Tensor, columns: int = 6) -> Path:
    """Write :func:`compare_grid` of a clip as a PNG; its folder is created. Return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(compare_grid(decoded, pixels, columns)).save(path)
    return path


def _window(largest: int, device: torch.device) -> Tensor:
    size = largest - (1 - largest % 2)
    line = torch.arange(size, dtype=torch.float64, device=device) - size // 2
    weights = torch.exp(-0.5 * (line / WINDOW_DEVIATION_PX).square())
    return weights / weights.sum()


def _smooth(x: Tensor, window: Tensor) -> Tensor:
    """Return the weighted local means of [B, C, H, W] at positions where the window fits whole."""
    planes = x.flatten(0, 1).unsqueeze(1)
    planes = F.conv2d(planes, window.view(1, 1, -1, 1))
    return F.conv2d(planes, window.view(1, 1, 1, -1)).unflatten(0, x.shape[:2]).squeeze(2)

"""gabor-pyramid: a perceptual distance of two pictures that needs no weights. It is not LPIPS.

A picture is split into brightness and two colour differences. At up to four resolutions each is
filtered by oriented band-pass pairs (Gabor 1946; Daugman 1985) and by a Gaussian, and a response is
divided by what the same place responds to in all orientations (Heeger 1992), as a cell of the
visual cortex is. The distance is the mean squared difference of what remains, less where it is too
small to be noticed, and at most 1 at a place. It sees what a viewer sees first: missing edges and
texture, wrong colours; noise counts less where the picture is busy.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = 4
"""Resolutions: full, 1/2, 1/4 and 1/8, as far as a side keeps SMALLEST_PX."""
SMALLEST_PX = 4
ORIENTATIONS = 4
KERNEL_PX = 5
WAVELENGTH_PX = 4.0
ENVELOPE_PX = 1.2
"""Deviation of the Gaussian around a band-pass filter: a bandwidth of about two octaves."""
SCALE_WEIGHTS = (0.4, 0.8, 1.0, 1.0)
"""Eyes see little of the finest detail, and noise has most of its energy there."""
COLOUR_WEIGHTS = (1.0, 0.5, 0.5)
"""Brightness and two colour differences; the eye's resolution of colour is lower."""
SEMI_SATURATION = 0.25
"""Response at which the division sets in, in units of pixel values in [-1, 1]."""
VISIBLE = 0.1
"""Difference of divided responses below which a viewer hardly notices; see :func:`_noticed`."""
MEAN_WEIGHT = 1.0
"""Of differences of local means, which band-pass filters do not see: brightness and hue."""
GAIN = 2.0
"""Brings photographs blurred by a Gaussian of two pixels to about 0.25."""

# Rows: brightness, blue and red difference (ITU-R BT.601), scaled to [-1, 1].
_TO_OPPONENT = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


class GaborPyramid(nn.Module):
    """The distance of pictures; everything in it is constant."""

    def __init__(self) -> None:
        """Build the filters."""
        super().__init__()
        self.register_buffer("opponent", torch.tensor(_TO_OPPONENT), persistent=False)
        self.register_buffer("colour_weights", torch.tensor(COLOUR_WEIGHTS), persistent=False)
        filters = torch.cat([_band_filters(), _gaussian(KERNEL_PX, ENVELOPE_PX)])
        self.register_buffer("filters", filters, persistent=False)

    def forward(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """Return the distances [N] of pictures [N, 3, H, W] in [-1, 1]."""
        total = decoded.new_zeros(len(decoded))
        with torch.no_grad():
            targets = list(self._responses(pixels))
        for scale, (mine, other) in enumerate(zip(self._responses(decoded), targets, strict=True)):
            noticed = _noticed((mine - other).square().sum(dim=2)).mean(dim=(2, 3))
            weights = self.get_buffer("colour_weights")[: noticed.shape[1]]
            total = total + SCALE_WEIGHTS[scale] * (noticed @ weights)
        return GAIN * total

    def _responses(self, pictures: Tensor) -> Iterator[Tensor]:
        """Yield [N, 1 or 3 colours, responses, h, w] per resolution."""
        opponent = self.get_buffer("opponent")
        x = torch.einsum("oc,nchw->nohw", opponent, pictures)
        for scale in range(SCALES):
            if scale:
                x = F.avg_pool2d(x, 2)
            # Colour differences are left out at full resolution, where the eye hardly sees them.
            yield self._divided(x[:, :1] if scale == 0 else x)
            if min(x.shape[2:]) < 2 * SMALLEST_PX:
                break

    def _divided(self, x: Tensor) -> Tensor:
        count, colours, height, width = x.shape
        side = KERNEL_PX // 2
        planes = F.pad(x.reshape(-1, 1, height, width), (side,) * 4, mode="replicate")
        filtered = F.conv2d(planes, self.get_buffer("filters"))
        bands, local_mean = filtered[:, :-1], filtered[:, -1:]
        energy = F.pad(bands.square().sum(dim=1, keepdim=True), (side,) * 4, mode="replicate")
        pool = F.conv2d(energy, self.get_buffer("filters")[-1:]) + SEMI_SATURATION**2
        responses = torch.cat([bands * pool.rsqrt(), MEAN_WEIGHT * local_mean], dim=1)
        return responses.view(count, colours, -1, height, width)


def _noticed(squared: Tensor) -> Tensor:
    """Return about ``squared`` between VISIBLE^2 and 1; faint ones count less."""
    return squared.square() / ((squared + VISIBLE**2) * (1 + squared))


def _gaussian(size: int, deviation: float) -> Tensor:
    line = torch.arange(size, dtype=torch.float64) - size // 2
    weights = torch.exp(-0.5 * (line / deviation).square())
    kernel = torch.outer(weights, weights)
    return (kernel / kernel.sum()).float().view(1, 1, size, size)


def _band_filters() -> Tensor:
    """Return [2 * ORIENTATIONS, 1, K, K]: an even and an odd filter per orientation.

    None responds to a flat area; each passes a grating of its wavelength with amplitude 1.
    """
    line = torch.arange(KERNEL_PX, dtype=torch.float64) - KERNEL_PX // 2
    y, x = torch.meshgrid(line, line, indexing="ij")
    envelope = torch.exp(-0.5 * (x.square() + y.square()) / ENVELOPE_PX**2)
    filters = []
    for number in range(ORIENTATIONS):
        angle = math.pi * number / ORIENTATIONS
        phase = 2 * math.pi / WAVELENGTH_PX * (x * math.cos(angle) + y * math.sin(angle))
        for wave in (phase.cos(), phase.sin()):
            kernel = envelope * wave
            kernel = kernel - envelope * (kernel.sum() / envelope.sum())
            filters.append(kernel / (kernel * wave).sum())
    return torch.stack(filters).float().unsqueeze(1)

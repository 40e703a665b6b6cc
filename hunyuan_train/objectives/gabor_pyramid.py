"""gabor-pyramid: a perceptual distance of two pictures that needs no weights. It is not LPIPS.

A picture is split into brightness and two colour differences. At up to four resolutions each is
filtered by oriented band-pass pairs (Gabor 1946; Daugman 1985) and by a Gaussian, and a response is
divided by what the same place responds to in all orientations (Heeger 1992), as a cell of the
visual cortex is. The distance is the mean squared difference of what remains, less where it is too
small to be noticed. It sees what a viewer sees first: missing edges and texture, wrong colours;
noise counts less where the picture is busy.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALES = 4
"""Resolutions: full, 1/2, 1/4 and 1/8, as far as a side keeps SMALLEST_PX."""
SMALLEST_PX = 4
ORIENTATIONS = 4
KERNEL_PX = 7
WAVELENGTH_PX = 4.0
ENVELOPE_PX = 1.6
"""Deviation of the Gaussian around a band-pass filter: a bandwidth of about an octave."""
SCALE_WEIGHTS = (0.4, 0.8, 1.0, 1.0)
"""Eyes see little of the finest detail, and noise has most of its energy there."""
COLOUR_WEIGHTS = (1.0, 0.5, 0.5)
"""Brightness and two colour differences; the eye's resolution of colour is lower."""
SEMI_SATURATION = 0.25
"""Response at which the division sets in, in units of pixel values in [-1, 1]."""
VISIBLE = 0.1
"""Difference of divided responses below which a viewer hardly notices; see :func:`_noticed`."""
MEAN_WEIGHT = 2.0
"""Of differences of local means, which band-pass filters do not see: brightness and hue."""
GAIN = 2.0
"""Brings a blur by two pixels to about 0.3, as it is by LPIPS, so that weights carry over."""

# Rows: brightness, blue and red difference (ITU-R BT.601), scaled to [-1, 1].
_TO_OPPONENT = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))


class GaborPyramid(nn.Module):
    """The distance of pictures; everything in it is constant."""

    def __init__(self) -> None:
        """Build the filters."""
        super().__init__()
        self.register_buffer("opponent", torch.tensor(_TO_OPPONENT), persistent=False)
        self.register_buffer("bands", _band_filters(), persistent=False)
        self.register_buffer("blur", _gaussian(KERNEL_PX, ENVELOPE_PX), persistent=False)

    def forward(self, decoded: Tensor, pixels: Tensor) -> Tensor:
        """Return the distances [N] of pictures [N, 3, H, W] in [-1, 1]."""
        both = torch.cat([decoded, pixels])
        x = torch.einsum("oc,nchw->nohw", self.get_buffer("opponent"), both)
        total = decoded.new_zeros(len(decoded))
        for scale, weight in enumerate(SCALE_WEIGHTS):
            if scale:
                x = F.avg_pool2d(x, 2)
            total = total + weight * self._distance(x)
            if min(x.shape[2:]) < 2 * SMALLEST_PX:
                break
        return GAIN * total

    def _distance(self, x: Tensor) -> Tensor:
        count, colours, height, width = x.shape
        planes = x.reshape(count * colours, 1, height, width)
        side = KERNEL_PX // 2
        padded = F.pad(planes, (side, side, side, side), mode="replicate")
        bands = F.conv2d(padded, self.get_buffer("bands"))
        local_mean = F.conv2d(padded, self.get_buffer("blur"))
        energy = F.pad(bands.square().sum(dim=1, keepdim=True), (side,) * 4, mode="replicate")
        pool = F.conv2d(energy, self.get_buffer("blur")) + SEMI_SATURATION**2
        responses = torch.cat([bands * pool.rsqrt(), MEAN_WEIGHT * local_mean], dim=1)
        mine, other = responses.view(count, colours, -1, height, width).chunk(2)
        noticed = _noticed((mine - other).square().sum(dim=2)).mean(dim=(2, 3))
        return noticed @ noticed.new_tensor(COLOUR_WEIGHTS)


def _noticed(squared: Tensor) -> Tensor:
    """Return about ``squared`` far above VISIBLE^2, and its square over VISIBLE^2 far below."""
    return squared.square() / (squared + VISIBLE**2)


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

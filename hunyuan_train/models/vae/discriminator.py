"""The 3-D patch discriminator: is this part of a clip a recording or a reconstruction?

Isola et al. 2017 (arXiv 1611.07004) with a third dimension. Nothing is normalised over the batch,
so the logits of a sample never depend on the others or on how samples are spread over ranks.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_train.models.vae.discriminator_config import DiscriminatorConfig
from hunyuan_train.models.vae.layers import NORM_EPS, Features

SLOPE = 0.2
"""Of the leaky ReLU below zero."""
LAST_GAIN = 0.1
"""Of the last kernel at the start: logits near 0, on the slope of the hinge on both sides."""


class PatchConv3d(nn.Module):
    """Convolve with repeated borders, so that an image is judged like a clip that stands still.

    With a stride of 2 the kernel has 4 positions a side: every pixel reaches equally many outputs.
    A kernel of 3 would send every other pixel twice the gradient, which shows as a checkerboard.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """Build a cubic kernel for a stride of 1 or 2 in time, height and width."""
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv3d(inputs, outputs, 4 if stride == 2 else 3, stride=stride)

    def forward(self, x: Features) -> Features:
        """Return the convolution; n positions of a direction become ceil(n / stride)."""
        if x.shape[2] == 1:
            # The past and future of a lone frame are copies of it: one 2-D kernel does the same.
            padded = F.pad(x.squeeze(2), self._padding(x.shape[3:]), mode="replicate")
            weight = self.conv.weight.sum(dim=2)
            return F.conv2d(padded, weight, self.conv.bias, stride=self.stride).unsqueeze(2)
        return self.conv(F.pad(x, self._padding(x.shape[2:]), mode="replicate"))

    def _padding(self, sizes: torch.Size) -> list[int]:
        after = [1 + size % 2 if self.stride == 2 else 1 for size in reversed(sizes)]
        return [amount for end in after for amount in (1, end)]


class PatchDiscriminator(nn.Module):
    """Clips or images to a logit per patch; high means recorded, low means reconstructed."""

    def __init__(self, cfg: DiscriminatorConfig, colours: int = 3) -> None:
        """Build and initialise the network for pixels of ``colours`` channels."""
        super().__init__()
        widths = cfg.widths
        self.conv_in = PatchConv3d(colours, widths[0], stride=2)
        self.halvings = nn.ModuleList([PatchConv3d(a, b, stride=2) for a, b in pairwise(widths)])
        last = min(2 * widths[-1], 8 * cfg.base_channels)
        self.mixing = PatchConv3d(widths[-1], last, stride=1)
        groups = cfg.norm_groups
        norms = [
            nn.GroupNorm(groups, width, eps=NORM_EPS) if groups else nn.Identity()
            for width in [*widths[1:], last]
        ]
        self.norms = nn.ModuleList(norms)
        self.conv_out = PatchConv3d(last, 1, stride=1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter, also after construction on the meta device.

        | parameter | value |
        |---|---|
        | kernels | N(0, 2 / (1 + 0.2^2) / fan-in), which keeps the variance behind a leaky ReLU |
        | last kernel | a tenth of N(0, 1 / fan-in) |
        | norms, biases | 1, 0 |
        """
        gain = nn.init.calculate_gain("leaky_relu", SLOPE)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=gain * module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.get_parameter("bias"))
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        self.conv_out.conv.weight.mul_(LAST_GAIN / gain)

    def forward(self, pixels: Float[Tensor, "B C F H W"]) -> Float[Tensor, "B 1 f h w"]:
        """Return logits.

        Args:
            pixels: [B, colours, F, H, W] near [-1, 1]; any sizes from 1 up.

        Returns:
            [B, 1, f, h, w]: every size halved ``layers`` times, rounded up each time.
        """
        x = F.leaky_relu(self.conv_in(pixels), SLOPE)
        for conv, norm in zip([*self.halvings, self.mixing], self.norms, strict=True):
            x = F.leaky_relu(norm(conv(x)), SLOPE)
        return self.conv_out(x)

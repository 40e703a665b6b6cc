"""The 4x8x8 causal 3-D VAE of HunyuanVideo: encoder, decoder and the posterior between them.

Despite its name it is causal only in its convolutions and its attention: every GroupNorm averages
over the whole clip, so a latent frame depends on later frames too, and an image encodes differently
from the first frame of a video.
"""

from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_train.models.shapes import Latents, PerSample
from hunyuan_train.models.vae.config import SPATIAL_RATIO, TEMPORAL_RATIO, VaeConfig
from hunyuan_train.models.vae.layers import (
    CausalConv3d,
    ClipNorm,
    DownBlock,
    Features,
    FrameCausalAttention,
    MidBlock,
    ResnetBlock,
    Stride,
    UpBlock,
    Upsample,
)
from hunyuan_train.models.vae.tiling import Tiling, tiled

Pixels: TypeAlias = Float[Tensor, "B colours frames height width"]

# Equal, and therefore not a mirror image: at half resolution the encoder still has every frame, but
# the decoder only half of them.
DOWN_STRIDES: list[Stride | None] = [(1, 2, 2), (2, 2, 2), (2, 2, 2), None]
UP_FACTORS: list[Stride | None] = [(1, 2, 2), (2, 2, 2), (2, 2, 2), None]

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
        """Return the distribution whose mean and log-variance are the two halves of the channels.

        Args:
            moments: [B, 2 * C, T, h, w], as the encoder gives them.
        """
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


class Encoder(nn.Module):
    """Pixels to twice the latent channels: mean and log-variance."""

    def __init__(self, cfg: VaeConfig) -> None:
        """Build the stages of ``cfg.block_channels`` from full to 1/8 resolution."""
        super().__init__()
        widths, groups = list(cfg.block_channels), cfg.norm_groups
        inputs = [widths[0], *widths[:-1]]
        self.conv_in = CausalConv3d(cfg.in_channels, widths[0])
        self.down_blocks = nn.ModuleList(
            [
                DownBlock(before, after, cfg.layers_per_block, groups, stride)
                for before, after, stride in zip(inputs, widths, DOWN_STRIDES, strict=True)
            ]
        )
        self.mid_block = MidBlock(widths[-1], groups, cfg.mid_attention)
        self.conv_norm_out = ClipNorm(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * cfg.latent_channels)

    def forward(self, pixels: Pixels) -> Features:
        """Return [B, 2 * latent_channels, T, h, w]."""
        x = self.conv_in(pixels)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, cfg: VaeConfig) -> None:
        """Build the stages of ``cfg.block_channels`` from 1/8 to full resolution."""
        super().__init__()
        widths, groups = list(reversed(cfg.block_channels)), cfg.norm_groups
        inputs = [widths[0], *widths[:-1]]
        self.conv_in = CausalConv3d(cfg.latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0], groups, cfg.mid_attention)
        self.up_blocks = nn.ModuleList(
            [
                UpBlock(before, after, cfg.layers_per_block + 1, groups, factor)
                for before, after, factor in zip(inputs, widths, UP_FACTORS, strict=True)
            ]
        )
        self.conv_norm_out = ClipNorm(groups, widths[-1])
        self.conv_out = CausalConv3d(widths[-1], cfg.out_channels)

    def forward(self, latents: Latents) -> Pixels:
        """Return pixels without a final squashing; values may leave [-1, 1]."""
        x = self.mid_block(self.conv_in(latents))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class CausalVae3D(nn.Module):
    """HunyuanVideo's autoencoder: 4n+1 frames of H x W pixels to n+1 latent frames of H/8 x W/8.

    ``encode`` and ``decode`` speak unscaled latents; ``scale`` and ``unscale`` go to and from the
    unit variance that diffusion works in.
    """

    def __init__(self, cfg: VaeConfig) -> None:
        """Build and initialise the network."""
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv3d(2 * cfg.latent_channels, 2 * cfg.latent_channels, 1)
        self.post_quant_conv = nn.Conv3d(cfg.latent_channels, cfg.latent_channels, 1)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter, also after construction on the meta device.

        | parameter | value |
        |---|---|
        | kernels | N(0, 1 / fan-in), so that the linear path keeps its variance |
        | last kernel of every residual branch | 0: the network starts as its skip path |
        | convolutions after an enlargement | identity on the present frame |
        | log-variance | near -6: a std of 0.05, not the 1 that drowns the image |
        | norms, other biases | 1, 0 |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Linear):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.get_parameter("bias"))
            elif isinstance(module, nn.GroupNorm):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.conv.weight)
            elif isinstance(module, FrameCausalAttention):
                nn.init.zeros_(module.get_parameter("to_out.0.weight"))
            elif isinstance(module, Upsample):
                kernel = module.conv.conv.weight
                nn.init.zeros_(kernel)
                kernel[:, :, -1, 1, 1].fill_diagonal_(1.0)
        channels = self.cfg.latent_channels
        self.quant_conv.weight[channels:] *= 0.1
        self.quant_conv.get_parameter("bias")[channels:] = INITIAL_LOGVAR

    def encode(self, pixels: Pixels) -> Posterior:
        """Return the posterior of unscaled latents.

        Args:
            pixels: [B, 3, 4n+1, H, W] in [-1, 1], H and W multiples of 8.

        Returns:
            Mean and standard deviation, each [B, latent_channels, n+1, H/8, W/8].

        Raises:
            ValueError: If the number of channels, frames, the height or the width does not fit.
        """
        check_pixels(pixels.shape, self.cfg.in_channels)
        return Posterior.from_moments(tiled(self._encode_tile, pixels, Tiling.for_encode(self.cfg)))

    def decode(self, latents: Latents) -> Pixels:
        """Return pixels near [-1, 1] for unscaled latents.

        Args:
            latents: [B, latent_channels, n+1, h, w], unscaled.

        Returns:
            [B, 3, 4n+1, 8h, 8w].

        Raises:
            ValueError: If the tensor is not a latent video of this VAE.
        """
        if latents.ndim != 5 or latents.shape[1] != self.cfg.latent_channels:
            raise ValueError(
                f"latents of shape {list(latents.shape)} cannot be decoded; give "
                f"[batch, {self.cfg.latent_channels}, frames, height, width]"
            )
        return tiled(self._decode_tile, latents, Tiling.for_decode(self.cfg))

    def scale(self, latents: Latents) -> Latents:
        """Return latents with a standard deviation near 1, as the transformer sees them."""
        return latents * self.cfg.scaling_factor

    def unscale(self, latents: Latents) -> Latents:
        """Return latents as ``decode`` takes them."""
        return latents / self.cfg.scaling_factor

    def _encode_tile(self, pixels: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(pixels))

    def _decode_tile(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))


def check_pixels(shape: torch.Size, colours: int) -> None:
    """Raise ValueError, with the nearest legal values, unless the shape can be encoded."""
    if len(shape) != 5 or shape[1] != colours:
        raise ValueError(
            f"pixels of shape {list(shape)} cannot be encoded; give "
            f"[batch, {colours}, frames, height, width]"
        )
    frames, height, width = shape[2:]
    if frames % TEMPORAL_RATIO != 1:
        lower = max(1, (frames - 1) // TEMPORAL_RATIO * TEMPORAL_RATIO + 1)
        raise ValueError(
            f"a video of {frames} frames cannot be encoded; the number of frames must be "
            f"{TEMPORAL_RATIO}n+1, nearest are {lower} and {lower + TEMPORAL_RATIO}"
        )
    for name, size in (("height", height), ("width", width)):
        if size % SPATIAL_RATIO or size == 0:
            lower = max(SPATIAL_RATIO, size // SPATIAL_RATIO * SPATIAL_RATIO)
            raise ValueError(
                f"a {name} of {size} px cannot be encoded; it must be a multiple of "
                f"{SPATIAL_RATIO}, nearest are {lower} and {lower + SPATIAL_RATIO}"
            )

"""The 4x8x8 causal 3-D VAE of HunyuanVideo: encoder, decoder and the posterior between them.

Despite its name it is causal only in its convolutions and its attention: every GroupNorm averages
over the whole clip, so a latent frame depends on later frames too, and an image encodes differently
from the first frame of a video.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_train.models.shapes import Latents
from hunyuan_train.models.vae.base import INITIAL_LOGVAR, Pixels, Vae
from hunyuan_train.models.vae.config import VaeConfig
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

# Equal, and therefore not a mirror image: at half resolution the encoder still has every frame, but
# the decoder only half of them.
DOWN_STRIDES: list[Stride | None] = [(1, 2, 2), (2, 2, 2), (2, 2, 2), None]
UP_FACTORS: list[Stride | None] = [(1, 2, 2), (2, 2, 2), (2, 2, 2), None]


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


class CausalVae3D(Vae):
    """HunyuanVideo's autoencoder: 4n+1 frames of H x W pixels to n+1 latent frames of H/8 x W/8."""

    def __init__(self, cfg: VaeConfig) -> None:
        """Build and initialise the network."""
        super().__init__(cfg)
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

    def encode_tile(self, pixels: Tensor) -> Tensor:
        """Return mean and log-variance of pixels that are not cut further."""
        return self.quant_conv(self.encoder(pixels))

    def decode_tile(self, latents: Tensor) -> Tensor:
        """Return pixels of latents that are not cut further."""
        return self.decoder(self.post_quant_conv(latents))

"""The 4x16x16 VAE of HunyuanVideo-1.5; attribute names are the released checkpoint's keys.

Its norms work on one position at a time, so that, unlike its predecessor, it is strictly causal: a
latent depends on its frame and those before it, and an image encodes like the first frame of a
video. Resolutions change by packing pixels into channels beside a convolution whose result is added
(as in deep-compression autoencoders, arXiv 2410.10733).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_train.models.shapes import Latents
from hunyuan_train.models.vae.base import INITIAL_LOGVAR, Pixels, Vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.layers import CausalConv3d, Features, Stride, attend_past

# Down: time shrinks in the last two steps. Up: it grows in the first two.
DOWN: list[Stride | None] = [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 2, 2), None]
UP: list[Stride | None] = [(2, 2, 2), (2, 2, 2), (1, 2, 2), (1, 2, 2), None]


class ChannelNorm(nn.Module):
    """Divide the channels of a position by their root mean square."""

    def __init__(self, channels: int) -> None:
        """Build a gain per channel."""
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Features) -> Features:
        """Return features of the same shape, normalised in float32 at least."""
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        return F.normalize(wide, dim=1).to(x.dtype) * x.shape[1] ** 0.5 * self.gamma


class Residual(nn.Module):
    """Two normalised convolutions around a skip connection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Build a block; a 1x1x1 convolution carries the skip when the channels change."""
        super().__init__()
        self.norm1 = ChannelNorm(inputs)
        self.conv1 = CausalConv3d(inputs, outputs)
        self.norm2 = ChannelNorm(outputs)
        self.conv2 = CausalConv3d(outputs, outputs)
        self.conv_shortcut = nn.Conv3d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Features) -> Features:
        """Return x plus its residual, same size, ``outputs`` channels."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class PastAttention(nn.Module):
    """One attention head as wide as the features; a frame sees itself and the frames before it."""

    def __init__(self, channels: int) -> None:
        """Build projections of ``channels`` features with bias."""
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.to_q = nn.Conv3d(channels, channels, 1)
        self.to_k = nn.Conv3d(channels, channels, 1)
        self.to_v = nn.Conv3d(channels, channels, 1)
        self.proj_out = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Features) -> Features:
        """Return x plus the attended values, same shape."""
        frames = x.shape[2]
        normed = self.norm(x)
        query, key, value = (
            layer(normed).flatten(2).transpose(1, 2).unsqueeze(1)  # [B, 1, T*H*W, C]
            for layer in (self.to_q, self.to_k, self.to_v)
        )
        attended = attend_past(query, key, value, frames, 0).squeeze(1)
        return x + self.proj_out(attended.transpose(1, 2).reshape(x.shape))


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int) -> None:
        """Build the middle of an encoder or decoder."""
        super().__init__()
        self.attentions = nn.ModuleList([PastAttention(channels)])
        self.resnets = nn.ModuleList([Residual(channels, channels) for _ in range(2)])

    def forward(self, x: Features) -> Features:
        """Return features of the same shape."""
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class PackDown(nn.Module):
    """Halve the resolution: a packed convolution plus the mean of packed channels.

    The first frame has no partner: in steps that halve time it is packed in space only.
    """

    def __init__(self, inputs: int, outputs: int, factor: Stride) -> None:
        """Build a step by (time, height, width) factors."""
        super().__init__()
        self.factor = factor
        self.outputs = outputs
        self.conv = CausalConv3d(inputs, outputs // (factor[0] * factor[1] * factor[2]))

    def forward(self, x: Features) -> Features:
        """Return fewer positions: n frames become 1 + (n - 1) / factor."""
        hidden = self.conv(x)
        if self.factor[0] == 1:
            return pack(hidden, self.factor) + self._mean(pack(x, self.factor))
        still = (1, *self.factor[1:])
        first = pack(hidden[:, :, :1], still).repeat(1, 2, 1, 1, 1)
        first = first + self._mean(pack(x[:, :, :1], still))
        if x.shape[2] == 1:
            return first
        rest = pack(hidden[:, :, 1:], self.factor) + self._mean(pack(x[:, :, 1:], self.factor))
        return torch.cat([first, rest], dim=2)

    def _mean(self, packed: Tensor) -> Tensor:
        return packed.unflatten(1, (self.outputs, -1)).mean(dim=2)


class UnpackUp(nn.Module):
    """Double the resolution: an unpacked convolution plus unpacked copies of the channels.

    In steps that double time the first frame stays one frame.
    """

    def __init__(self, inputs: int, outputs: int, factor: Stride) -> None:
        """Build a step by (time, height, width) factors."""
        super().__init__()
        self.factor = factor
        packed = factor[0] * factor[1] * factor[2] * outputs
        self.copies = packed // inputs
        self.conv = CausalConv3d(inputs, packed)

    def forward(self, x: Features) -> Features:
        """Return more positions: n frames become 1 + factor * (n - 1)."""
        hidden = self.conv(x)
        if self.factor[0] == 1:
            return unpack(hidden + x.repeat_interleave(self.copies, dim=1), self.factor)
        still = (1, *self.factor[1:])
        first = unpack(hidden[:, :, :1], still)
        first = first[:, : first.shape[1] // 2] + unpack(x[:, :, :1], still).repeat_interleave(
            self.copies // 2, dim=1
        )
        if x.shape[2] == 1:
            return first
        rest = unpack(hidden[:, :, 1:], self.factor) + unpack(
            x[:, :, 1:], self.factor
        ).repeat_interleave(self.copies, dim=1)
        return torch.cat([first, rest], dim=2)


def pack(x: Tensor, factor: Stride) -> Tensor:
    """Return [B, t*h*w*C, T/t, H/h, W/w]: blocks of (t, h, w) positions side by side."""
    time, height, width = factor
    x = x.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(2, (-1, time))
    return x.permute(0, 3, 5, 7, 1, 2, 4, 6).flatten(1, 4)


def unpack(x: Tensor, factor: Stride) -> Tensor:
    """Return [B, C / (t*h*w), T*t, H*h, W*w], the inverse of ``pack``."""
    x = x.unflatten(1, (*factor, -1)).permute(0, 4, 5, 1, 6, 2, 7, 3)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Down(nn.Module):
    """Residual blocks of one encoder resolution and the step to the next."""

    def __init__(
        self, inputs: int, width: int, layers: int, outputs: int, factor: Stride | None
    ) -> None:
        """Build ``layers`` blocks of ``width`` channels; ``factor=None`` keeps the resolution."""
        super().__init__()
        widths = [inputs] + [width] * layers
        self.resnets = nn.ModuleList([Residual(widths[i], width) for i in range(layers)])
        self.downsamplers = nn.ModuleList([PackDown(width, outputs, factor)] if factor else [])

    def forward(self, x: Features) -> Features:
        """Return features at the next resolution."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class Up(nn.Module):
    """Residual blocks of one decoder resolution and the step to the next."""

    def __init__(
        self, inputs: int, width: int, layers: int, outputs: int, factor: Stride | None
    ) -> None:
        """Build ``layers`` blocks of ``width`` channels; ``factor=None`` keeps the resolution."""
        super().__init__()
        widths = [inputs] + [width] * layers
        self.resnets = nn.ModuleList([Residual(widths[i], width) for i in range(layers)])
        self.upsamplers = nn.ModuleList([UnpackUp(width, outputs, factor)] if factor else [])

    def forward(self, x: Features) -> Features:
        """Return features at the next resolution."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pixels to twice the latent channels: mean and log-variance."""

    def __init__(self, cfg: VaeConfig) -> None:
        """Build the stages of ``cfg.block_channels`` from full to 1/16 resolution."""
        super().__init__()
        widths, self.outputs = list(cfg.block_channels), 2 * cfg.latent_channels
        self.conv_in = CausalConv3d(cfg.in_channels, widths[0])
        # A step down changes the channels too, so every stage begins at its own width.
        self.down_blocks = nn.ModuleList(
            [
                Down(width, width, cfg.layers_per_block, after, factor)
                for width, after, factor in zip(widths, [*widths[1:], 0], DOWN, strict=True)
            ]
        )
        self.mid_block = Middle(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], self.outputs)

    def forward(self, pixels: Pixels) -> Features:
        """Return [B, 2 * latent_channels, T, h, w]."""
        x = self.conv_in(pixels)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)
        shortcut = x.unflatten(1, (self.outputs, -1)).mean(dim=2)
        return self.conv_out(F.silu(self.norm_out(x))) + shortcut


class Decoder(nn.Module):
    """Latents to pixels."""

    def __init__(self, cfg: VaeConfig) -> None:
        """Build the stages of ``cfg.block_channels`` from 1/16 to full resolution."""
        super().__init__()
        widths = list(reversed(cfg.block_channels))
        self.copies = widths[0] // cfg.latent_channels
        self.conv_in = CausalConv3d(cfg.latent_channels, widths[0])
        self.up_blocks = nn.ModuleList(
            [
                Up(width, width, cfg.layers_per_block + 1, after, factor)
                for width, after, factor in zip(widths, [*widths[1:], 0], UP, strict=True)
            ]
        )
        self.mid_block = Middle(widths[0])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], cfg.out_channels)

    def forward(self, latents: Latents) -> Pixels:
        """Return pixels without a final squashing; values may leave [-1, 1]."""
        x = self.conv_in(latents) + latents.repeat_interleave(self.copies, dim=1)
        x = self.mid_block(x)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class StrictlyCausalVae(Vae):
    """HunyuanVideo-1.5's autoencoder: a latent frame is 1/16 of the height and of the width."""

    def __init__(self, cfg: VaeConfig) -> None:
        """Build and initialise the network."""
        super().__init__(cfg)
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialise every parameter, also after construction on the meta device.

        | parameter | value |
        |---|---|
        | kernels | N(0, 1 / fan-in), so that the linear path keeps its variance |
        | last kernel of every residual branch, steps between resolutions | 0: only the skip path |
        | log-variance | near -6: a std of 0.05, not the 1 that drowns the image |
        | gains, biases | 1, 0 |
        """
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.get_parameter("bias"))
            elif isinstance(module, ChannelNorm):
                nn.init.ones_(module.gamma)
        for module in self.modules():
            if isinstance(module, Residual):
                nn.init.zeros_(module.conv2.conv.weight)
            elif isinstance(module, PackDown | UnpackUp):
                nn.init.zeros_(module.conv.conv.weight)
            elif isinstance(module, PastAttention):
                nn.init.zeros_(module.proj_out.weight)
        out, channels = self.encoder.conv_out.conv, self.cfg.latent_channels
        out.weight[channels:] *= 0.1
        out.get_parameter("bias")[channels:] = INITIAL_LOGVAR

    def encode_tile(self, pixels: Tensor) -> Tensor:
        """Return mean and log-variance of pixels that are not cut further."""
        return self.encoder(pixels)

    def decode_tile(self, latents: Tensor) -> Tensor:
        """Return pixels of latents that are not cut further."""
        return self.decoder(latents)

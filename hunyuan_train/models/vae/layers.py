"""Building blocks of the causal 3-D VAE; attribute names are the released checkpoint's keys."""

from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from hunyuan_train.models.vae.reach import WHOLE, Reach

NORM_EPS = 1e-6

# Channels, frames, height, width: the four sizes differ before and after a layer.
Features: TypeAlias = Float[Tensor, "B _ _ _ _"]
Stride: TypeAlias = tuple[int, int, int]


class CausalConv3d(nn.Module):
    """Convolve without looking at later frames.

    Borders repeat the edge values: half a kernel on each side in space, a whole kernel less one
    before the first frame and nothing after the last (HunyuanVideo report, section 4.1).
    """

    reach: Reach = WHOLE

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, stride: Stride = (1, 1, 1)
    ) -> None:
        """Build a cubic kernel; stride is (time, height, width)."""
        super().__init__()
        self.kernel = kernel
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride=stride)

    def forward(self, x: Features) -> Features:
        """Return the convolution; time n becomes ceil(n / stride), likewise height and width."""
        if self.kernel == 1:
            return self.conv(x)
        side = self.kernel // 2
        if self.reach.clip_frames(x) == 1:
            return self._single_frame(x, side)
        pads = (side, side, side, side, self.kernel - 1, 0)
        padded = self.reach.padded(x, pads, self.conv.stride)
        if _wants_onednn(padded):
            conv = self.conv
            return torch.mkldnn_convolution(
                padded, conv.weight, conv.bias, [0, 0, 0], conv.stride, [1, 1, 1], 1
            )
        return self.conv(padded)

    def _single_frame(self, x: Features, side: int) -> Features:
        # The padded past of a lone frame is copies of itself, so the taps in time add up to one 2-D
        # kernel: a third of the work, and 2-D convolutions are faster per operation.
        padded = self.reach.padded(x.squeeze(2), (side,) * 4, self.conv.stride[1:])
        weight = self.conv.weight.sum(dim=2)
        return F.conv2d(padded, weight, self.conv.bias, stride=self.conv.stride[1:]).unsqueeze(2)


def _wants_onednn(x: Tensor) -> bool:
    # torch sends a batch of one to a generic kernel below a size threshold: 62 ms instead of 8 ms
    # for 32 channels of 9 x 48 x 48 on one core. Backward has the same rule; only inference gains.
    return (
        x.device.type == "cpu"
        and x.shape[0] == 1
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and torch.backends.mkldnn.is_available()
    )


class ClipNorm(nn.GroupNorm):
    """Group norm that averages over all frames, rows and columns of a clip."""

    reach: Reach = WHOLE

    def __init__(self, groups: int, channels: int) -> None:
        """Build a norm of ``channels`` in ``groups`` with weight and bias."""
        super().__init__(groups, channels, eps=NORM_EPS)

    def forward(self, input: Features) -> Features:
        """Return features of the same shape."""
        return self.reach.normalised(input, self)


class ResnetBlock(nn.Module):
    """Two normalised convolutions around a skip connection."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        """Build a block; a 1x1x1 convolution carries the skip when the channels change."""
        super().__init__()
        self.norm1 = ClipNorm(groups, inputs)
        self.conv1 = CausalConv3d(inputs, outputs)
        self.norm2 = ClipNorm(groups, outputs)
        self.conv2 = CausalConv3d(outputs, outputs)
        self.conv_shortcut = CausalConv3d(inputs, outputs, kernel=1) if inputs != outputs else None

    def forward(self, x: Features) -> Features:
        """Return x plus its residual, same size, ``outputs`` channels."""
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        return hidden + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class FrameCausalAttention(nn.Module):
    """One attention head as wide as the features; a frame sees itself and the frames before it."""

    reach: Reach = WHOLE

    def __init__(self, channels: int, groups: int) -> None:
        """Build projections of ``channels`` features with bias."""
        super().__init__()
        self.group_norm = ClipNorm(groups, channels)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x: Features) -> Features:
        """Return x plus the attended values, same shape."""
        batch, channels, frames, height, width = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, T*H*W, C]
        query, key, value = (
            layer(tokens).unsqueeze(1) for layer in (self.to_q, self.to_k, self.to_v)
        )
        key, value, earlier = self.reach.past(key, value, frames)
        attended = attend_past(query, key, value, frames, earlier).squeeze(1)
        out = self.to_out[0](attended).transpose(1, 2)
        return x + out.reshape(batch, channels, frames, height, width)


def attend_past(query: Tensor, key: Tensor, value: Tensor, frames: int, earlier: int) -> Tensor:
    # Frame by frame over a growing slice of the past instead of a [T*H*W, T*H*W] mask: half the
    # work, and a 17 x 32 x 32 tile would need a mask of 303 million entries.
    keys = key.shape[2] // (earlier + frames)
    parts = []
    for frame, now in enumerate(query.chunk(frames, dim=2), start=earlier + 1):
        end = frame * keys
        parts.append(F.scaled_dot_product_attention(now, key[:, :, :end], value[:, :, :end]))
    return torch.cat(parts, dim=2)


class MidBlock(nn.Module):
    """Residual block, optional attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, groups: int, attention: bool) -> None:
        """Build the middle of an encoder or decoder."""
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups) for _ in range(2)])
        layers = [FrameCausalAttention(channels, groups)] if attention else []
        self.attentions = nn.ModuleList(layers)

    def forward(self, x: Features) -> Features:
        """Return features of the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Downsample(nn.Module):
    """Strided causal convolution."""

    def __init__(self, channels: int, stride: Stride) -> None:
        """Build a 3x3x3 convolution with a (time, height, width) stride."""
        super().__init__()
        self.conv = CausalConv3d(channels, channels, stride=stride)

    def forward(self, x: Features) -> Features:
        """Return fewer positions: n frames become (n - 1) // stride + 1."""
        return self.conv(x)


class Upsample(nn.Module):
    """Nearest-neighbour enlargement that never doubles the first frame, then a convolution."""

    reach: Reach = WHOLE

    def __init__(self, channels: int, factor: Stride) -> None:
        """Build an enlargement by (time, height, width) factors."""
        super().__init__()
        self.factor = factor
        self.conv = CausalConv3d(channels, channels)

    def forward(self, x: Features) -> Features:
        """Return more positions: n frames become 1 + factor * (n - 1)."""
        # Enlarging every frame alike and dropping the surplus copies of the first one is the same
        # as treating it apart, without joining two tensors.
        enlarged = F.interpolate(x, scale_factor=self.factor, mode="nearest")
        surplus = self.factor[0] - 1 if self.reach.begins else 0
        return self.conv(enlarged[:, :, surplus:])


class DownBlock(nn.Module):
    """Residual blocks of one encoder resolution and the step to the next."""

    def __init__(
        self, inputs: int, outputs: int, layers: int, groups: int, stride: Stride | None
    ) -> None:
        """Build ``layers`` residual blocks; ``stride=None`` keeps the resolution."""
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList(
            [ResnetBlock(widths[i], outputs, groups) for i in range(layers)]
        )
        self.downsamplers = nn.ModuleList([Downsample(outputs, stride)] if stride else [])

    def forward(self, x: Features) -> Features:
        """Return features with ``outputs`` channels at the next resolution."""
        for layer in (*self.resnets, *self.downsamplers):
            x = layer(x)
        return x


class UpBlock(nn.Module):
    """Residual blocks of one decoder resolution and the step to the next."""

    def __init__(
        self, inputs: int, outputs: int, layers: int, groups: int, factor: Stride | None
    ) -> None:
        """Build ``layers`` residual blocks; ``factor=None`` keeps the resolution."""
        super().__init__()
        widths = [inputs] + [outputs] * layers
        self.resnets = nn.ModuleList(
            [ResnetBlock(widths[i], outputs, groups) for i in range(layers)]
        )
        self.upsamplers = nn.ModuleList([Upsample(outputs, factor)] if factor else [])

    def forward(self, x: Features) -> Features:
        """Return features with ``outputs`` channels at the next resolution."""
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x

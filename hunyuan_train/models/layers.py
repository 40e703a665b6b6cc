"""Small layers of a diffusion transformer: embedders, modulation, MLP, patching."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hunyuan_kernels import gated_residual, gelu_linear2, norm_modulate
from hunyuan_train.models.shapes import (
    Heads,
    ImgTokens,
    JointTokens,
    Latents,
    Patches,
    PerSample,
    Pooled,
    TokenMask,
    Vec,
    Velocity,
)

NORM_EPS = 1e-6
FREQUENCY_DIM = 256
MAX_PERIOD = 10_000.0


def widened(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is that already."""
    return x if x.dtype == torch.float64 else x.float()


def sinusoid(value: PerSample) -> Float[Tensor, "B 256"]:
    """Embed a scalar per sample as [cos(v f_i), sin(v f_i)], f_i = 10000^(-i/128), in float32.

    The input stays float32 up to here: bfloat16 rounds a time of 986.4 to 988 and a guidance of
    6000 to 6016, whose embeddings have cosine similarities of 0.93 and 0.63 with the right ones.

    Source: Attention Is All You Need, section 3.5, cosines first.
    """
    half = FREQUENCY_DIM // 2
    index = torch.arange(half, dtype=torch.float32, device=value.device)
    angle = value.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) / half * index)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class ScalarEmbedder(nn.Module):
    """Sinusoid -> Linear -> SiLU -> Linear, for the model time and the guidance scale."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(FREQUENCY_DIM, hidden_size),
            nn.SiLU(),
            nn.Linear(hidden_size, hidden_size),
        )

    def forward(self, value: PerSample) -> Vec:
        """Embed float32 values [B] (0..1000 for time) as [B, D] in the weights' dtype."""
        return self.mlp(sinusoid(value).to(self.mlp.get_parameter("0.weight").dtype))


class VectorEmbedder(nn.Module):
    """Linear -> SiLU -> Linear for the pooled text vector."""

    def __init__(self, in_features: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_features, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, vector: Pooled) -> Vec:
        """Embed [B, P] as [B, D]."""
        vector = vector.to(self.in_layer.weight.dtype)
        return self.out_layer(functional.silu(self.in_layer(vector)))


class GivenTokens(NamedTuple):
    """The tokens of given frames, and what they are modulated with."""

    vecs: Float[Tensor, "B 2 D"]
    """The usual conditioning, then that of a clean frame: time 0 and the pooled text, without
    guidance."""
    tokens: TokenMask
    """[B, S], True for tokens of given frames."""


class Shift(NamedTuple):
    """One triple of a modulation, each [B, D], the same for all tokens of a sample."""

    shift: Vec
    scale: Vec
    gate: Vec

    def norm(self, x: JointTokens) -> JointTokens:
        """Normalise tokens [B, S, D], scale and shift them."""
        return norm_modulate(x, self.shift, self.scale, NORM_EPS)

    def add(self, x: JointTokens, branch: JointTokens) -> JointTokens:
        """Add a gated branch to tokens, both [B, S, D]."""
        return gated_residual(x, self.gate, branch)


class ShiftOfTwo(NamedTuple):
    """Two triples, of which each token takes its own.

    Both are applied to all tokens: the fused kernels keep no more for two than for one, where
    modulations spread over tokens would be kept in three further tensors of their size.
    """

    usual: Shift
    given: Shift
    tokens: TokenMask

    def norm(self, x: JointTokens) -> JointTokens:
        """Normalise tokens [B, S, D], scale and shift them."""
        return torch.where(self.tokens[..., None], self.given.norm(x), self.usual.norm(x))

    def add(self, x: JointTokens, branch: JointTokens) -> JointTokens:
        """Add a gated branch to tokens, both [B, S, D]."""
        given, usual = self.given.add(x, branch), self.usual.add(x, branch)
        return torch.where(self.tokens[..., None], given, usual)


class Modulation(nn.Module):
    """SiLU(vec) -> Linear(D, 3D or 6D), cut into (shift, scale, gate) triples.

    Source: adaLN-Zero, Peebles and Xie 2023 (DiT), section 3.2; zero at initialisation.
    """

    def __init__(self, hidden_size: int, triples: int) -> None:
        super().__init__()
        self.triples = triples
        self.linear = nn.Linear(hidden_size, 3 * triples * hidden_size)

    def forward(self, vec: Tensor) -> list[Shift]:
        """Return one ``Shift`` per normalised branch; ``vec`` is [B, D] or [B, 2, D]."""
        parts = self.linear(functional.silu(vec)).chunk(3 * self.triples, dim=-1)
        return [Shift(*parts[3 * i : 3 * i + 3]) for i in range(self.triples)]


def modulations(
    module: Modulation, vec: Vec, given: GivenTokens | None
) -> list[Shift] | list[ShiftOfTwo]:
    """Return one modulation per normalised branch.

    With and without given frames the module is called once and returns as many tensors: ranks may
    differ in that, and what shards weights counts both.
    """
    if given is None:
        return module(vec)
    pairs = [
        [Shift(*parts) for parts in zip(*(tensor.unbind(dim=1) for tensor in shift), strict=True)]
        for shift in module(given.vecs)
    ]
    return [ShiftOfTwo(usual, clean, given.tokens) for usual, clean in pairs]


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the channels of a head, in float32, with a learned weight [E].

    Source: Zhang and Sennrich 2019, equation 4; on q and k, Dehghani et al. 2023.
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__(head_dim, eps=NORM_EPS)

    def forward(self, x: Heads) -> Heads:
        """Normalise [B, S, A, E]."""
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _RmsNormCpu.apply(x, self.weight, NORM_EPS)  # pyright: ignore[reportReturnType]
        return functional.rms_norm(x, self.normalized_shape, self.weight, NORM_EPS)


class _RmsNormCpu(torch.autograd.Function):
    """RMSNorm in half the passes over memory of torch's CPU path, which is a chain of small ops.

    With n = x * rstd and g the gradient of y = n * w:  dw = sum(g * n)  and
    dx = rstd * (g * w - n * mean(g * n * w)).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = widened(x)
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [B, S, A, 1]
        ctx.save_for_backward(x, weight, rstd)
        return (wide * rstd).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, rstd = ctx.saved_tensors
        weight_dtype = weight.dtype
        grad, weight = widened(grad), widened(weight)
        normed = widened(x) * rstd
        products = grad * normed
        mean = (products @ weight).div_(x.shape[-1])[..., None]
        d_x = (grad * weight).addcmul_(normed, mean, value=-1.0).mul_(rstd)
        d_weight = products.flatten(0, -2).sum(dim=0)
        return d_x.to(x.dtype), d_weight.to(weight_dtype), None


class Mlp(nn.Module):
    """Linear -> activation -> Linear; GELU is the tanh approximation."""

    def __init__(self, hidden_size: int, inner_size: int, act: Literal["gelu", "silu"]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, inner_size)
        self.act = nn.GELU(approximate="tanh") if act == "gelu" else nn.SiLU()
        self.fc2 = nn.Linear(inner_size, hidden_size)

    def forward(self, x: JointTokens) -> JointTokens:
        """Map [B, S, D] to [B, S, D]."""
        return self.fc2(self.act(self.fc1(x)))


class GeluLinear(nn.Linear):
    """A linear over two inputs side by side, the second through a tanh GELU first."""

    def forward(self, input: Tensor, mlp: Tensor | None = None) -> Tensor:
        """Map [..., D] and [..., M] to [..., F]; alone, ``input`` is [..., D + M], GELU done."""
        if mlp is None:
            return super().forward(input)
        return gelu_linear2(input, mlp, self.weight, self.bias)


class PatchEmbed(nn.Module):
    """Cut [B, C, T, H, W] into (pt, ph, pw) patches and project each to D channels.

    The parameters are those of a Conv3d whose stride is its kernel; the product is done as one
    matrix multiplication, which is the same numbers without the 3-D convolution kernels.
    """

    def __init__(self, patch_size: Sequence[int], in_channels: int, hidden_size: int) -> None:
        super().__init__()
        frames, rows, columns = patch_size
        self.patch_size = (frames, rows, columns)
        self.proj = nn.Conv3d(
            in_channels, hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def cut(self, latents: Latents) -> Patches:
        """Return the patches [B, N, C*pt*ph*pw], frames slowest and columns fastest."""
        batch, channels, frames, height, width = latents.shape
        pt, ph, pw = self.patch_size
        patches = latents.reshape(
            batch, channels, frames // pt, pt, height // ph, ph, width // pw, pw
        )
        return patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def forward(self, patches: Patches) -> ImgTokens:
        """Project [B, N, C*pt*ph*pw] to tokens [B, N, D]."""
        weight = self.proj.weight.flatten(1)  # [D, C*pt*ph*pw]
        return functional.linear(patches.to(weight.dtype), weight, self.proj.bias)


def unpatchify(tokens: Patches, grid: tuple[int, int, int], patch_size: Sequence[int]) -> Velocity:
    """Undo the cut: [B, N, F], channel slowest, to [B, C, T, H, W]."""
    (frames, rows, columns), (pt, ph, pw) = grid, patch_size
    x = tokens.unflatten(-1, (-1, pt, ph, pw)).unflatten(1, (frames, rows, columns))
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)  # [B, C, t, pt, h, ph, w, pw]
    # One reshape makes a fresh tensor; sharded modules must not return a view.
    return x.reshape(*x.shape[:2], frames * pt, rows * ph, columns * pw)


class FinalLayer(nn.Module):
    """Modulated norm and projection to patches; the modulation order is shift, scale."""

    def __init__(self, hidden_size: int, patch_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, img: ImgTokens, vec: Vec) -> Patches:
        """Map [B, N, D] to [B, N, F]."""
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)
        return self.linear(norm_modulate(img, shift, scale, NORM_EPS))

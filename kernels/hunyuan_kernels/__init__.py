"""Fused kernels of a video diffusion transformer, each beside the plain PyTorch it replaces."""

from hunyuan_kernels.ops.adamw_ema.op import adamw_ema
from hunyuan_kernels.ops.gated_residual.op import gated_residual
from hunyuan_kernels.ops.gelu_linear2.op import gelu_linear2
from hunyuan_kernels.ops.lse_merge.op import lse_merge
from hunyuan_kernels.ops.norm_modulate.op import norm_modulate
from hunyuan_kernels.ops.qk_norm_rope.op import qk_norm_rope

__all__ = [
    "adamw_ema",
    "gated_residual",
    "gelu_linear2",
    "lse_merge",
    "norm_modulate",
    "qk_norm_rope",
]

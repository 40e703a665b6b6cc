"""Column and row linears by Megatron-Core, in place of those of ``parallel/tensor.py``.

Megatron wants tokens as [S, B, D], because the collectives of sequence parallelism cut dim 0, and
it returns a pair; here both are wrapped so that a linear of Megatron is called like ``nn.Linear``.
Groups are handed over, so Megatron's own are never initialised. With sequence parallelism Megatron
works on GPUs only.

Source: Megatron-LM (arXiv 1909.08053), Korthikanti et al. (arXiv 2205.05198).
"""

import warnings
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hunyuan_train.parallel.layout import Slices


def megatron_linear(
    linear: nn.Linear,
    style: Literal["column", "row"],
    slices: Slices,
    group: ProcessGroup,
    sequence_parallel: bool,
) -> nn.Module:
    """Cut ``linear`` for this rank, on the device it is on, ``meta`` included.

    The result has the parameters ``weight`` and ``bias`` and is called like ``linear``:

    - column: whole tokens [B, S, D], or with sequence parallelism this rank's [B, S / size, D],
      to this rank's features [B, S, F / size];
    - row: this rank's features [B, S, F / size] to whole tokens [B, S, D], or this rank's
      [B, S / size, D], of which the bias then has a partial gradient.

    Args:
        linear: The whole linear.
        style: Whether rows (``column``) or columns (``row``) of the weight are divided.
        slices: Which of them are this rank's; parts of a fused weight may be several runs.
        group: Tensor-parallel ranks.
        sequence_parallel: Whether tokens are sequence shards outside of a pair of linears.

    Raises:
        ValueError: Megatron-Core is not installed.
    """
    config_type, column, row = _megatron_types()
    config = config_type(
        tensor_model_parallel_size=group.size(),
        sequence_parallel=sequence_parallel,
        params_dtype=linear.weight.dtype,
        # Not "on the CPU": on the default device, and left to us.
        use_cpu_initialization=True,
        perform_initialization=False,
        # Gradients go to weight.grad as usual, not to a buffer of Megatron's own optimizer.
        gradient_accumulation_fusion=False,
    )
    shared: dict[str, Any] = {
        "config": config,
        "init_method": nn.init.zeros_,  # not called
        "bias": linear.bias is not None,
        "skip_bias_add": False,
        "tp_group": group,
    }
    sizes = linear.in_features, linear.out_features
    with linear.weight.device:
        if style == "column":
            cut = column(*sizes, gather_output=False, **shared)
        else:
            cut = row(*sizes, input_is_parallel=True, **shared)
    if not linear.weight.is_meta:
        _copy_share(linear, cut, style, slices)
    return cut


@torch.no_grad()
def _copy_share(linear: nn.Linear, cut: Any, style: str, slices: Slices) -> None:
    """Copy this rank's part of the weights of ``linear``."""
    cut.weight.copy_(slices.take(linear.weight))
    if linear.bias is not None:
        part = Slices(slices.shape[:1], 0, slices.runs)
        cut.bias.copy_(part.take(linear.bias) if style == "column" else linear.bias)


class _CalledLikeLinear:
    """Mixin over a linear of Megatron: tokens [B, S, D] in, one tensor out, no extra state."""

    sequence_parallel: bool

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens as :func:`megatron_linear` says."""
        if not self.sequence_parallel:
            return super().forward(x)[0]  # pyright: ignore[reportAttributeAccessIssue]
        out, _ = super().forward(x.transpose(0, 1).contiguous())  # pyright: ignore[reportAttributeAccessIssue]
        return out.transpose(0, 1).contiguous()

    get_extra_state = nn.Module.get_extra_state


@cache
def _megatron_types() -> tuple[Any, Any, Any]:
    """Return the configuration and our column and row linears over Megatron's.

    Raises:
        ValueError: Megatron-Core is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about Apex and Transformer Engine, not needed here
            from megatron.core import parallel_state
            from megatron.core.model_parallel_config import ModelParallelConfig
            from megatron.core.tensor_parallel.layers import (
                ColumnParallelLinear,
                RowParallelLinear,
            )
    except ImportError as error:
        raise ValueError(
            "parallel.tensor_engine=megatron needs a package that is not installed: "
            "`pip install hunyuan_train[megatron]`, or set parallel.tensor_engine=native"
        ) from error
    # All of Megatron's global state that its linears use: where gathered tokens are put.
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    column = type("MegatronColumnLinear", (_CalledLikeLinear, ColumnParallelLinear), {})
    row = type("MegatronRowLinear", (_CalledLikeLinear, RowParallelLinear), {})
    return ModelParallelConfig, column, row

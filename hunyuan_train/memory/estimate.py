"""What one rank's memory holds, in closed form: model states and the activations of a micro-batch.

The activations are the tensors that autograd saves when nothing is recomputed. Per token, in units
of the hidden size: 13 + 2r in a double block and 10 + 2r in a single block, ``r`` being the MLP
ratio (its hidden layer before and after the GELU); :mod:`tests.unit.test_memory_estimate` counts
them. Workspace of kernels, fragmentation and gathered layers of ZeRO are left to ``reserve``.
"""

from dataclasses import dataclass

from hunyuan_train.models.hunyuan.config import HunyuanConfig

DOUBLE_WIDTHS, SINGLE_WIDTHS, END_WIDTHS = 13, 10, 3
"""Saved tensors of hidden size per token, MLP aside: per double block, per single block, in all."""
UNCUT_WIDTHS = 6
"""Those of a block that tensor parallelism without sequence parallelism leaves whole."""
STATE_BYTES = 20
"""Per parameter in float32: weight, gradient, two moments of Adam, average."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """How many ranks share each part of the memory."""

    tp: int = 1
    sp: bool = False
    cp: int = 1
    states: int = 1
    """Ranks that model states are sharded over, tensor parallelism aside."""


def activation_bytes(model: HunyuanConfig, dtype_bytes: int, shards: Shards) -> float:
    """Return the bytes that one image or text token of a micro-batch costs this rank."""
    blocks = model.num_double_blocks + model.num_single_blocks
    widths = (
        model.num_double_blocks * (DOUBLE_WIDTHS + 2 * model.mlp_ratio)
        + model.num_single_blocks * (SINGLE_WIDTHS + 2 * model.mlp_ratio)
        + END_WIDTHS
    )
    uncut = 0 if shards.sp else UNCUT_WIDTHS * blocks + END_WIDTHS
    cut = (widths - uncut) / shards.tp + uncut
    return cut * model.hidden_size * dtype_bytes / shards.cp


def state_bytes(parameters: int, shards: Shards) -> float:
    """Return the bytes of this rank's part of weights, gradients, optimizer state and average."""
    return STATE_BYTES * parameters / (shards.tp * shards.states)


def max_tokens(
    model: HunyuanConfig,
    parameters: int,
    memory_bytes: float,
    dtype_bytes: int,
    shards: Shards,
    reserve: float = 0.15,
) -> int:
    """Return how many tokens of one micro-batch fit on the ranks that share it.

    Args:
        model: the transformer.
        parameters: of the whole model.
        memory_bytes: of one rank's device.
        dtype_bytes: of one activation value.
        shards: how the memory is shared.
        reserve: share of the memory left for what the formula leaves out.

    Raises:
        ValueError: the model states alone do not fit.
    """
    states = state_bytes(parameters, shards)
    free = memory_bytes * (1 - reserve) - states
    tokens = int(free / activation_bytes(model, dtype_bytes, shards))
    if tokens < 1:
        raise ValueError(
            f"the states of {parameters:,} parameters take {states / 2**30:.1f} GiB of the "
            f"{memory_bytes / 2**30:.1f} GiB of a rank, so no token fits; raise parallel.tp, "
            "use parallel.zero_stage=3 on more ranks, or set data.max_tokens by hand"
        )
    return tokens

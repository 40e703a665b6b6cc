"""First values of a laid-out model, the same in every layout."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hunyuan_train.models.spec import InitKind, InitRule
from hunyuan_train.runtime.seed import keyed_torch_generator


@torch.no_grad()
def init_parameters(model: nn.Module, rules: Mapping[str, InitRule], seed: int) -> None:
    """Fill every parameter from its rule, drawing from a generator keyed by its name.

    Each rank draws the whole of one parameter at a time on the CPU and keeps its shard, so the
    weights depend neither on the layout nor on the device, and nothing is sent.

    Args:
        model: Parameters allocated, plain or DTensor.
        rules: Rule of every parameter by name.
        seed: Seed of the run.
    """
    for name, parameter in model.named_parameters():
        rule = rules[name]
        if rule.kind in (InitKind.ZEROS, InitKind.ONES):
            rule.fill(parameter)
            continue
        full = torch.empty(parameter.shape, dtype=torch.float32)
        rule.fill(full, keyed_torch_generator(seed, "init", name))
        local_part(parameter).copy_(shard_of(full, parameter))


@torch.no_grad()
def fill_parameters(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Fill every parameter from whole tensors read one at a time; each rank keeps its part."""
    for name, parameter in model.named_parameters():
        local_part(parameter).copy_(shard_of(read(name), parameter))


def local_part(parameter: Tensor) -> Tensor:
    """Return the tensor this rank stores for ``parameter``."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def shard_of(full: Tensor, parameter: Tensor) -> Tensor:
    """Return the part of ``full`` that this rank stores when ``parameter`` is a DTensor."""
    if not isinstance(parameter, DTensor):
        return full
    shape, offset = compute_local_shape_and_global_offset(
        full.shape, parameter.device_mesh, parameter.placements
    )
    index = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return full[index]

"""First values of a laid-out model, the same in every layout."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from hunyuan_train.models.spec import InitKind, InitRule
from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.parallel.layout import Slices
from hunyuan_train.runtime.seed import keyed_torch_generator


@torch.no_grad()
def init_parameters(model: ParallelModel, rules: Mapping[str, InitRule], seed: int) -> None:
    """Fill every parameter from its rule, drawing from a generator keyed by its name.

    Each rank draws the whole of one parameter at a time on the CPU and keeps its shard, so the
    weights depend neither on the layout nor on the device, and nothing is sent.

    Args:
        model: Parameters allocated.
        rules: Rule of every parameter of the single-device model by name.
        seed: Seed of the run.
    """
    for name, parameter in model.module.named_parameters():
        rule = rules[name]
        if rule.kind in (InitKind.ZEROS, InitKind.ONES):
            rule.fill(local_part(parameter))
            continue
        slices = model.slices.get(name)
        full = torch.empty(slices.shape if slices else parameter.shape, dtype=torch.float32)
        rule.fill(full, keyed_torch_generator(seed, "init", name))
        local_part(parameter).copy_(shard_of(full, parameter, slices))


def local_part(parameter: Tensor) -> Tensor:
    """Return the tensor this rank stores for ``parameter``."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def shard_of(full: Tensor, parameter: Tensor, slices: Slices | None = None) -> Tensor:
    """Return the part of ``full`` this rank stores: its tensor-parallel slices, then its shard."""
    if slices is not None:
        full = slices.take(full)
    if not isinstance(parameter, DTensor):
        return full
    shape, offset = compute_local_shape_and_global_offset(
        full.shape, parameter.device_mesh, parameter.placements
    )
    index = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
    return full[index]

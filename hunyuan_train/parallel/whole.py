"""Functions of whole tensors, applied to what ranks hold of them."""

from collections.abc import Callable

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def part_of_whole(param: Tensor, part: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return this rank's part of ``function`` of a whole tensor; all ranks of its mesh call it.

    Args:
        param: The parameter, plain or DTensor, whose layout ``part`` has.
        part: What this rank holds of the tensor.
        function: Keeps the shape; runs on every rank.
    """
    if not isinstance(param, DTensor):
        return function(part)
    mesh, placements = param.device_mesh, param.placements
    spread = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=param.shape, stride=param.stride()
    )
    result = function(spread.full_tensor())
    return distribute_tensor(result, mesh, placements, src_data_rank=None).to_local()


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor, plain or DTensor; all ranks of its mesh call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

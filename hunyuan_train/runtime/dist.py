"""Process group set-up and the handful of collectives that code outside ``parallel/`` needs."""

import datetime
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_train.runtime.device import resolve_device
from hunyuan_train.runtime.env import read_launch_env


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def init_world(device: str = "auto", timeout_s: float = 1800.0) -> World:
    """Join the process group a launcher describes, or form a group of one.

    Every process gets a group, also a lone one, so that sharding and checkpoints run the same code.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``.
        timeout_s: seconds a collective may take before it fails.
    """
    env = read_launch_env()
    place = resolve_device(device, env.local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        timeout = datetime.timedelta(seconds=timeout_s)
        if env.launched:
            store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
            # A restarted attempt must not read the keys the dead one left in a shared store.
            store = dist.PrefixStore(f"attempt_{env.restart_count}", store)
        else:
            store, rank, size = dist.HashStore(), 0, 1
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    return World(
        rank=dist.get_rank(),
        local_rank=env.local_rank,
        size=dist.get_world_size(),
        device=place,
    )


def close_world() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def ranks_in_world() -> int:
    """Return the number of processes, 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a tensor over all ranks in place and return it."""
    if ranks_in_world() > 1:
        dist.all_reduce(values)
    return values


def max_over_ranks(values: Tensor) -> Tensor:
    """Take the element-wise maximum over all ranks in place and return it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def broadcast_from_first(values: Tensor) -> Tensor:
    """Overwrite a tensor with that of rank 0, in place, and return it."""
    if ranks_in_world() > 1:
        dist.broadcast(values, 0)
    return values


def gather_objects(value: Any) -> list[Any]:
    """Return the picklable ``value`` of every rank, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()

"""Small exchanges of Python objects between the ranks that save or load together."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class Ranks:
    """The ranks of a process group, or this process alone where none is initialised."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, alone: bool = False) -> None:
        """Take ``group`` or the default group.

        Args:
            group: Best one with a CPU backend, so that nothing waits for the accelerator.
            alone: Stay alone even if a default group exists.
        """
        self.active = dist.is_available() and dist.is_initialized() and not alone
        self.group = group
        self.rank = dist.get_rank(group) if self.active else 0
        self.world_size = dist.get_world_size(group) if self.active else 1

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that renames, deletes and speaks."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Return every rank's ``value`` in rank order, on every rank; also a barrier."""
        if not self.active:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """Add a CPU tensor over the ranks in place and return it; int64 wraps around."""
        if not self.active:
            return values
        if "cpu:" in str(dist.get_backend_config(self.group)):
            dist.all_reduce(values, group=self.group)
            return values
        on_device = values.cuda()  # No CPU backend.
        dist.all_reduce(on_device, group=self.group)
        return values.copy_(on_device)

    def from_first(self, value: T) -> T:
        """Return the first rank's ``value`` on every rank."""
        if not self.active:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.group, group_src=0)
        return box[0]


@contextmanager
def without_dist_warning() -> Iterator[None]:
    """Keep torch from warning that a single process saves or loads alone, which is meant here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is .*single process")
        yield

"""The seam at which recomputation gets attention results back instead of computing them again.

An attention calls :func:`kept` around what computes its output and log-sum-exp. Whoever runs a
block twice (``memory.recompute``) sets the results of the first run aside and hands them out in the
second. This works inside of the operator, so it is the same for every kernel, mask and exchange.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from torch import Tensor

_Tensors = TypeVar("_Tensors", bound=tuple[Tensor, ...])


class Keeper(Protocol):
    """Decides whether an attention runs."""

    def results(self, run: Callable[[], _Tensors]) -> _Tensors:
        """Return what ``run`` returns, or returned in an earlier run of the same block."""
        ...


class _Active(threading.local):
    """The keeper of this thread: the backward of a GPU has a thread of its own."""

    keeper: Keeper | None = None


_active = _Active()


def kept(run: Callable[[], _Tensors]) -> _Tensors:
    """Return the tensors that ``run`` returns, in a second run of the block those of the first.

    Call it where autograd does not record, as in the forward of an ``autograd.Function`` that
    saves the results for its backward.
    """
    return run() if _active.keeper is None else _active.keeper.results(run)


@contextmanager
def keeping(keeper: Keeper) -> Iterator[None]:
    """Let ``keeper`` decide within this context, in this thread."""
    outer, _active.keeper = _active.keeper, keeper
    try:
        yield
    finally:
        _active.keeper = outer

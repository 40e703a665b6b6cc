"""Count the bytes a computation holds, on any device or on tensors without values.

With ``torch._subclasses.FakeTensorMode`` and torch's fake process group this measures one rank of
any layout on a machine that could not hold it.
"""

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages made inside, as they come, go and are resized.

    ``fully_shard`` frees gathered weights by resizing their storage to nothing, so resizes count.
    What a kernel allocates and frees inside one operator is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        """Now."""
        self.peak_bytes = 0
        """The most so far; set it to ``live_bytes`` to start a new measurement."""
        self._sizes: dict[int, int] = {}
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> Self:
        """Start to follow operators and resizes."""
        original, follow = self._resize, self._follow

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = original(storage, size)
            follow(storage, only_known=True)
            return result

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        super().__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        super().__exit__(kind, error, trace)
        torch.UntypedStorage.resize_ = self._resize

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run an operator and follow what it returns."""
        result = func(*args, **(kwargs or {}))
        self.add(tree_leaves(result))
        return result

    def add(self, values: Iterable[Any]) -> None:
        """Follow tensors made outside, e.g. the parameters of a model."""
        for value in values:
            if isinstance(value, Tensor):
                self._follow(_local(value).untyped_storage())

    def _follow(self, storage: torch.UntypedStorage, only_known: bool = False) -> None:
        key = storage._cdata
        if only_known and key not in self._sizes:
            return
        self.live_bytes += storage.nbytes() - self._sizes.get(key, 0)
        self._sizes[key] = storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if key not in self._refs:
            self._refs[key] = weakref.ref(storage, lambda _, key=key: self._forget(key))

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)
        self._refs.pop(key, None)


class SavedBytes(saved_tensors_hooks):
    """Bytes that autograd keeps between a forward inside and its backward, each storage once.

    Args:
        besides: Returns tensors that are there anyway, like parameters. It is asked whenever
            something is kept, because ``fully_shard`` exchanges them.
    """

    def __init__(self, besides: Callable[[], Iterable[Tensor]]) -> None:
        self._besides = besides
        self._storages: dict[int, torch.UntypedStorage] = {}
        super().__init__(self._pack, lambda tensor: tensor)

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = _local(tensor).untyped_storage()
        if storage._cdata not in self._storages and all(
            _local(other).untyped_storage()._cdata != storage._cdata for other in self._besides()
        ):
            self._storages[storage._cdata] = storage  # held, so that its address is not used again
        return tensor

    def take(self) -> int:
        """Return the bytes kept and let go of them, so that the backward can free them."""
        total = sum(storage.nbytes() for storage in self._storages.values())
        self._storages.clear()
        return total


def _local(tensor: Tensor) -> Tensor:
    """Return the part of a distributed tensor that is here, a plain tensor as it is."""
    return getattr(tensor, "_local_tensor", tensor)

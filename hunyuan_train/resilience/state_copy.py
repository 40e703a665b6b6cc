"""Copying a rank's part of the state into a slot in memory, and back."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.tensor import DTensor

from hunyuan_train.resilience.slots import PAGE, Part, Slot

_ALIGN = 64


@dataclass(frozen=True, slots=True)
class Copied:
    """A state in a slot, or on its way there."""

    plan: str
    """Of :func:`state_plan`."""
    tensor_bytes: int
    counter_bytes: int
    event: "torch.cuda.Event | None"

    def wait(self) -> None:
        """Wait until the device has copied everything."""
        if self.event is not None:
            self.event.synchronize()


class StateCopy:
    """Copies the same tensors again and again."""

    def __init__(self) -> None:
        self._shapes: list[tuple[torch.Size, torch.dtype]] = []
        self._plan = ""
        self._views: dict[int, list[Tensor]] = {}
        self._pinned: dict[int, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._event: torch.cuda.Event | None = None

    @torch.no_grad()
    def into(self, slot: Slot, tensors: Mapping[str, Any], counters: Mapping[str, Any]) -> Copied:
        """Copy a state; from an accelerator on a stream of its own, see :meth:`fence`.

        Raises:
            OSError: There is no room.
        """
        live = [part for _, part in local_parts(tensors)]
        text = json.dumps(counters).encode()
        shapes = [(part.shape, part.dtype) for part in live]
        if shapes != self._shapes:
            self._shapes, self._plan, self._views = shapes, state_plan(tensors), {}
        begins, end = _places(live)
        on_device = any(part.is_cuda for part in live)
        if slot.reserve(end + len(text)) or id(slot) not in self._views:
            memory = torch.frombuffer(slot.mapped, dtype=torch.uint8)
            if on_device:
                self._pin(id(slot), memory)
            self._views[id(slot)] = _views(memory[PAGE:], live, begins)
        views = self._views[id(slot)]
        slot.begin()
        slot.payload(end + len(text))[end:] = text
        self._event = None
        if on_device:
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                for view, part in zip(views, live, strict=True):
                    view.copy_(part, non_blocking=True)
                self._event = torch.cuda.Event()
                self._event.record()
        else:
            torch._foreach_copy_(views, live)
        return Copied(self._plan, end, len(text), self._event)

    def _pin(self, key: int, memory: Tensor) -> None:
        """Make the mapping of a slot fit for copies that the host does not wait for."""
        runtime: Any = torch.cuda.cudart()
        if (before := self._pinned.pop(key, None)) is not None:
            runtime.cudaHostUnregister(before.data_ptr())
        if not memory.is_pinned():
            runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            self._pinned[key] = memory

    def release(self) -> None:
        """Let go of the memory of all slots: they are to be opened anew."""
        for memory in self._pinned.values():
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(memory.data_ptr())
        self._pinned.clear()
        self._views.clear()

    def fence(self) -> None:
        """Let the present stream wait for the copies."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)


@torch.no_grad()
def fill_state(part: Part, payload: memoryview, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Overwrite the live tensors from a slot's payload and return the counters."""
    live = [tensor for _, tensor in local_parts(tensors)]
    begins, end = _places(live)
    assert end == part.tensor_bytes, "the plan was compared before"
    if end:
        views = _views(torch.frombuffer(payload, dtype=torch.uint8), live, begins)
        torch._foreach_copy_(live, views)
    return json.loads(bytes(payload[end:]))


def state_plan(tensors: Mapping[str, Any]) -> str:
    """Return a digest of names, shapes and types of what this rank stores."""
    listed = [(name, tuple(p.shape), str(p.dtype)) for name, p in local_parts(tensors)]
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]


def state_bytes(tensors: Mapping[str, Any]) -> int:
    """Return the room that :meth:`StateCopy.into` takes, without counters."""
    return _places([part for _, part in local_parts(tensors)])[1]


def local_parts(tensors: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the plain live tensors that this rank stores of nested tensors, with their names."""
    for name, value in tensors.items():
        if isinstance(value, Mapping):
            yield from local_parts(value, f"{prefix}{name}/")
        elif isinstance(value, DTensor):
            yield prefix + name, value.to_local()
        elif hasattr(value, "__create_chunk_list__"):  # a WholeView
            for chunk in value.__create_chunk_list__():
                offsets = chunk.offsets
                box = value.__get_tensor_shard__(MetadataIndex("", offsets))
                yield f"{prefix}{name}@{list(offsets)}", box
        else:
            yield prefix + name, value


def _places(live: Sequence[Tensor]) -> tuple[list[int], int]:
    """Return the first byte of each tensor, one after the other, and the end of the last."""
    begins, end = [], 0
    for part in live:
        begins.append(end)
        end += -(-part.numel() * part.element_size() // _ALIGN) * _ALIGN
    return begins, end


def _views(memory: Tensor, live: Sequence[Tensor], begins: Sequence[int]) -> list[Tensor]:
    """Return tensors over ``memory`` that are shaped like the live ones."""
    return [
        memory[begin : begin + part.numel() * part.element_size()].view(part.dtype).view(part.shape)
        for begin, part in zip(begins, live, strict=True)
    ]

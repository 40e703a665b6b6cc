"""Kept tensors on the host between forward and backward.

What a recomputed block keeps (its input, attention output and log-sum-exp) is copied to pinned
memory while the next block computes, and copied back one block ahead of its backward.

```text
forward    block i        | block i+1              | block i+2
           input leaves ->| attention of i leaves  | both are off the device
backward   block i+1                | block i
           tensors of i arrive      | and are here
```

Copies have two lanes of their own, one each way; on a CPU a lane copies at once, all else is the
same code. The host memory is a ring of pages of one size: those that came back last are taken
last, and buckets of any size share them. The device memory of a tensor is let go once its copy is
done, for which the computation waits if it must. This waiting is measured; where it takes more than
``WAIT_LIMIT`` of the time, the link cannot keep up and nothing is moved any more.
"""

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import TypeAlias
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

log = logging.getLogger(__name__)

PAGE_BYTES = 2**24
"""16 MiB: long enough for the full speed of a link, and torch rounds pinned memory up to a power of
two."""
WAIT_LIMIT = 0.05
"""Share of the time of a micro-step that may be spent waiting for copies."""
WARM_UP, WINDOW = 2, 8
"""Micro-steps that are not judged, because pages are pinned in them, and that are judged
together."""

_Stamp: TypeAlias = "float | torch.cuda.Event"


class Lane:
    """A queue of copies in one direction, beside the computation."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(self, pairs: list[tuple[Tensor, Tensor]]) -> "Copy":
        """Start copies (to, from), which wait for all that the computation was given so far."""
        if self._stream is None:
            for target, source in pairs:
                target.copy_(source)
            return Copy(None)
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(self._stream)
        return Copy(done)


@dataclass(frozen=True, slots=True)
class Copy:
    """Some copies that were started together."""

    done: torch.cuda.Event | None
    """None if they were done at once."""

    def wait(self) -> None:
        """Let the computation wait for them; the calling thread goes on."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)


class HostPages:
    """A ring of pages [bytes] uint8 that grows to the most that was ever in use.

    The computation has waited for the copies of a page that is given back, and copies wait for the
    computation, so that it may be written at once.
    """

    def __init__(self, page_bytes: int, pinned: bool) -> None:
        self.page_bytes, self._pinned = page_bytes, pinned
        self._free: deque[Tensor] = deque()
        self.count = 0
        """Pages there are."""

    @property
    def used(self) -> int:
        """Pages that hold something."""
        return self.count - len(self._free)

    def take(self, nbytes: int) -> list[Tensor]:
        """Return pages for so many bytes."""
        wanted = math.ceil(nbytes / self.page_bytes)
        while len(self._free) < wanted:
            page = torch.empty(self.page_bytes, dtype=torch.uint8, pin_memory=self._pinned)
            self._free.append(page)
            self.count += 1
        return [self._free.popleft() for _ in range(wanted)]

    def give_back(self, pages: list[Tensor]) -> None:
        """Take pages back."""
        self._free.extend(pages)


class Kept:
    """A tensor that a block keeps: on the device, on the host, or between them."""

    def __init__(self, owner: "Offload", block: int, tensor: Tensor, moves: bool) -> None:
        self._owner, self.block, self.moves = owner, block, moves
        self._here: Tensor | None = tensor.detach()
        self._version = tensor._version
        self._pages: list[Tensor] = []
        self._taken = False
        self._copy: Copy | None = None  # under way, in either direction
        self._shape, self._stride = tensor.shape, tensor.stride()
        self._dtype, self._device = tensor.dtype, tensor.device
        if moves:
            self._leave()

    def _leave(self) -> None:
        assert self._here is not None
        flat = _bytes_of(self._here)
        self._pages = self._owner.pages.take(flat.numel())
        self._copy = self._owner.outward.copy(self._beside_pages(flat))

    def _beside_pages(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        pieces = flat.split(self._owner.pages.page_bytes)
        return [(p[: s.numel()], s) for p, s in zip(self._pages, pieces, strict=True)]

    def let_go(self) -> None:
        """Let go of the device's copy, waiting until the host has it."""
        if not self.moves or self._here is None:
            return
        self._unchanged()
        if self._copy is not None:
            self._owner.meter.wait(self._copy)
        self._here = self._copy = None

    def send_for(self) -> None:
        """Start the way back, unless the tensor is here, on its way or back already."""
        if self._here is None and not self._taken:
            self._fetch()

    def _fetch(self) -> None:
        self._here = torch.empty_strided(
            self._shape, self._stride, dtype=self._dtype, device=self._device
        )
        flat = _bytes_of(self._here)
        pairs = [(piece, page) for page, piece in self._beside_pages(flat)]
        self._copy = self._owner.inward.copy(pairs)

    def take(self) -> Tensor:
        """Return the tensor once it is here; a second call has it fetched again."""
        if self._here is None:
            self._fetch()
        self._taken = True
        tensor = self._here
        assert tensor is not None
        if self._copy is not None:
            self._owner.meter.wait(self._copy)
            self._copy = None
        if self.moves:
            self._here = None
        else:
            self._unchanged()
        return tensor

    def _unchanged(self) -> None:
        assert self._here is not None
        assert self._here._version == self._version, "what a block keeps was changed in place"

    def __del__(self) -> None:
        # Its block's backward is over, or its graph was dropped, maybe with a copy under way.
        if getattr(self, "_copy", None) is not None:
            self._copy.wait()  # pyright: ignore[reportOptionalMemberAccess]
        if getattr(self, "_pages", None):
            self._owner.pages.give_back(self._pages)


class Meter:
    """Measures how long the computation waits for copies."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._starts: deque[_Stamp] = deque()
        self._waits: deque[list[tuple[_Stamp, _Stamp]]] = deque()

    def start(self) -> None:
        """Begin a micro-step."""
        self._starts.append(self._stamp())
        self._waits.append([])

    def wait(self, copy: Copy) -> None:
        """Wait for a copy and remember how long."""
        before = self._stamp()
        copy.wait()
        if self._waits:
            self._waits[-1].append((before, self._stamp()))

    def finished(self) -> list[tuple[float, float]]:
        """Return seconds waited and passed of each micro-step that is over and not yet returned."""
        found = []
        while len(self._starts) > 1 and self._passed(self._starts[1]):
            first = self._starts.popleft()
            waited = sum(self._between(a, b) for a, b in self._waits.popleft())
            found.append((waited, self._between(first, self._starts[0])))
        return found

    def _stamp(self) -> _Stamp:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _passed(self, stamp: _Stamp) -> bool:
        return stamp.query() if isinstance(stamp, torch.cuda.Event) else True

    def _between(self, first: _Stamp, second: _Stamp) -> float:
        if isinstance(first, torch.cuda.Event) and isinstance(second, torch.cuda.Event):
            return first.elapsed_time(second) / 1000
        assert isinstance(first, float)
        assert isinstance(second, float)
        return second - first


class Offload:
    """Moves what blocks keep to the host and back.

    Args:
        blocks: how many there are; the last one's backward comes at once, so it is left out.
        share: of the others that are moved, evenly spread.
        min_bytes: smaller tensors stay.
        page_bytes: of one page of host memory.
    """

    def __init__(
        self,
        blocks: int,
        share: float = 1.0,
        min_bytes: float = 2**20,
        page_bytes: int = PAGE_BYTES,
    ) -> None:
        self._chosen = [math.floor((i + 1) * share) > math.floor(i * share) for i in range(blocks)]
        self._chosen[-1:] = [False] * len(self._chosen[-1:])
        self._min_bytes, self._page_bytes = min_bytes, page_bytes
        self._kept: dict[int, list[ref[Kept]]] = {}
        self._leaving: deque[tuple[int, ref[Kept]]] = deque()
        self._judged: list[tuple[float, float]] = []
        self._device: torch.device | None = None
        self._warned = False
        self.active = True
        """Whether tensors are moved; False once the link was found too slow."""
        self.pages: HostPages
        self.outward: Lane
        self.inward: Lane
        self.meter: Meter

    def of_block(self, index: int) -> saved_tensors_hooks:
        """Return hooks for the tensors kept by the ``index``-th block of a forward."""
        started = False

        def pack(tensor: Tensor) -> Kept:
            nonlocal started
            if not started:
                started = True
                self._start_block(index, tensor.device)
            return self._keep(index, tensor)

        return saved_tensors_hooks(pack, self._restore)

    def _start_block(self, index: int, device: torch.device) -> None:
        if self._device is None:
            self._device = device
            self.pages = HostPages(self._page_bytes, pinned=device.type == "cuda")
            self.outward, self.inward, self.meter = Lane(device), Lane(device), Meter(device)
        if index == 0:
            self._leaving.clear()
            self._judge()
            self.meter.start()
        # What was kept last of the block before last has had one block's time to leave.
        while self._leaving and self._leaving[0][0] < index - 1:
            kept = self._leaving.popleft()[1]()
            if kept is not None:
                kept.let_go()
        self._kept[index] = []

    def _keep(self, index: int, tensor: Tensor) -> Kept:
        moves = (
            self.active
            and self._chosen[index]
            and tensor.nbytes >= self._min_bytes
            and tensor.is_floating_point()
            and _is_dense(tensor)
        )
        kept = Kept(self, index, tensor, moves)
        self._kept[index].append(ref(kept))
        if moves:
            self._leaving.append((index, ref(kept)))
        return kept

    def _restore(self, kept: Kept) -> Tensor:
        """Return a tensor for its block's backward and send for those of the block before."""
        for index in (kept.block, kept.block - 1):
            for reference in self._kept.get(index, ()):
                other = reference()
                if other is not None:
                    other.send_for()
        return kept.take()

    def _judge(self) -> None:
        """Stop moving if the computation waited too long in the last micro-steps."""
        self._judged += self.meter.finished()
        if self._warned or len(self._judged) < WARM_UP + WINDOW:
            return
        waited, passed = map(sum, zip(*self._judged[-WINDOW:], strict=True))
        del self._judged[: -WINDOW - WARM_UP]
        if waited <= WAIT_LIMIT * passed:
            return
        self._warned = True
        self.active = not self._fits_device()
        log.warning(
            "waiting for copies to and from the host took %.0f %% of the time, so memory.offload "
            "is %s; lower memory.offload_share, or cut the sequence over more ranks",
            100 * waited / passed,
            "left on only because its tensors do not fit the device" if self.active else "now off",
        )

    def _fits_device(self) -> bool:
        """Return whether what was moved would have fitted at the time of the most memory."""
        if self._device is None or self._device.type != "cuda":
            return True
        free = torch.cuda.mem_get_info(self._device)[0]
        unused = torch.cuda.memory_reserved(self._device)
        unused -= torch.cuda.max_memory_allocated(self._device)
        return self.pages.count * self._page_bytes <= free + unused


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the elements fill one piece of memory, in whatever order of dims."""
    expected = 1
    dims = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    for stride, size in dims:
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0


def _bytes_of(tensor: Tensor) -> Tensor:
    """View a dense tensor as its bytes in memory order, [bytes] uint8."""
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)

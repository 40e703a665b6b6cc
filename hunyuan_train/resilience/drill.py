"""Injects the faults of ``resilience.faults`` into one rank, to see that a run survives them.

A drill stands behind the heartbeat: every phase that the loop marks is a moment at which a fault
can strike. On a rank without faults nothing of this exists. Each fault is written to the events
right before it strikes, so that reports can tell how long it took to be noticed.
"""

import ctypes
import logging
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hunyuan_train.resilience.events import EventKind, Events
from hunyuan_train.resilience.faults import Fault, FaultKind, parse_faults
from hunyuan_train.resilience.heartbeat import Heartbeat
from hunyuan_train.runtime.env import read_attempt, read_job_folder

log = logging.getLogger(__name__)

_FOREVER_S = 10**6
_SETTLE_S = 60.0
_TINY_FILE_BYTES = 512


class DrillError(RuntimeError):
    """What the fault ``exception`` raises."""


class _WorkerEnds(BaseException):
    """Ends a thread that reads data; an ordinary error would only cost the sample."""


def drilled(heart: Heartbeat, run: Any) -> Heartbeat:
    """Return ``heart``, behind which wait the faults meant for this rank and attempt, if any.

    Args:
        heart: Where the rank says what it does.
        run: The ``TrainRun`` whose parts are struck. Which element and which bit is drawn depends
            on its seed.

    Raises:
        ValueError: a fault of the writer process where there is none.
    """
    rank = run.world.rank
    entries = parse_faults(run.cfg.resilience.faults)
    faults = [fault for fault in entries if fault.concerns(rank, read_attempt())]
    if not faults:
        return heart
    for fault in faults:
        if fault.kind in _WRITER and not run.cfg.checkpoint.asynchronous:
            raise ValueError(
                f"resilience.faults has {fault.kind}, which strikes the process that writes "
                "checkpoints; set checkpoint.asynchronous=true"
            )
    events = Events(read_job_folder() or run.cfg.run.dir, rank=rank)
    drill = _Drill(faults, run, events, rank, run.cfg.run.seed)
    return cast(Heartbeat, _DrilledHeart(heart, drill))


class _DrilledHeart:
    """A heartbeat that lets faults strike after each mark."""

    def __init__(self, heart: Heartbeat, drill: "_Drill") -> None:
        self._heart, self._drill = heart, drill

    def phase(self, name: str, bucket: str = "") -> Any:
        restore = self._heart.phase(name, bucket)
        self._drill.at(name)
        return restore

    def __getattr__(self, name: str) -> Any:
        return getattr(self._heart, name)


class _Drill:
    """The faults of one rank that are still to come."""

    def __init__(self, faults: list[Fault], run: Any, events: Events, rank: int, seed: int) -> None:
        self._waiting, self._run, self._events = faults, run, events
        self._rank, self._seed = rank, seed
        self._delay: Fault | None = None
        self._began_s, self._usual_s = 0.0, 0.0
        self._limited: tuple[int, tuple[int, int]] | None = None
        """A writer process and the limits of its files before they were lowered."""

    def at(self, phase: str) -> None:
        """Let the faults strike that are due in this phase."""
        if phase == "save":
            self._lift_limit()
        under_way = self._run.state.step + (phase not in ("evaluate", "save"))
        for fault in [f for f in self._waiting if (f.phase, f.step) == (phase, under_way)]:
            self._waiting.remove(fault)
            self._strike(fault)
        if phase == "forward":
            self._dawdle()
            self._began_s = time.perf_counter()
        elif phase == "backward":
            self._usual_s = time.perf_counter() - self._began_s

    def _strike(self, fault: Fault) -> None:
        newest = self._newest_checkpoint() if fault.kind in _STORAGE else None
        log.warning(
            "drill: %s strikes rank %d in %s of step %d",
            *(fault.kind, self._rank, fault.phase, fault.step),
        )
        self._events.emit(EventKind.fault, fault=fault.kind, step=fault.step, phase=fault.phase)
        if newest is not None:
            _STORAGE[fault.kind](newest, self._rank, self._draw(fault))
        elif fault.kind in _ENDS:
            _ENDS[fault.kind](fault)
        else:
            _OTHERS[fault.kind](self, fault)

    def _draw(self, fault: Fault) -> random.Random:
        return random.Random(f"{self._seed} {self._rank} {fault.kind} {fault.step}")

    def _newest_checkpoint(self) -> Path:
        """Return the newest checkpoint once nothing is being written any more."""
        checkpoints = self._run.checkpoints
        background = checkpoints._background
        step = background.step if background is not None else -1
        until = time.monotonic() + _SETTLE_S
        while time.monotonic() < until:
            saved = [path for path in checkpoints.saved() if int(path.name[5:]) >= step]
            if saved:
                return saved[-1]
            time.sleep(0.01)
        raise DrillError(f"there is no checkpoint in {checkpoints.folder} to strike")

    def slow(self, fault: Fault) -> None:
        self._delay = fault

    def _dawdle(self) -> None:
        """Compute in vain: a rank that sleeps would not look busy."""
        if self._delay is not None:
            seconds = self._delay.seconds or (self._delay.factor - 1) * self._usual_s
            until = time.perf_counter() + seconds
            while time.perf_counter() < until:
                pass

    def flip_parameter(self, fault: Fault) -> None:
        updates = self._run.state.updates
        _change(updates.local_weights(), self._draw(fault), _flip)
        updates.weights_changed()

    def flip_moment(self, fault: Fault) -> None:
        moments = self._run.state.updates.local_moments()
        named = {f"{p}/{key}": t for p, both in moments.items() for key, t in both.items()}
        _change(
            {name: t for name, t in named.items() if t.numel() > 1}, self._draw(fault), _flip
        )  # not the count of updates, which is the same for all

    def flip_gradient(self, fault: Fault) -> None:
        _change(self._run.state.updates.local_gradients(), self._draw(fault), _flip)

    def nan(self, fault: Fault) -> None:
        _change(self._run.state.updates.local_gradients(), self._draw(fault), _spoil)

    def flip_wire(self, fault: Fault) -> None:
        """Change the gradient between its sum over ranks and the update."""
        updates = self._run.state.updates
        update = updates.step

        def struck(norm: Tensor) -> Tensor:
            del updates.step
            _change(updates.local_gradients(), self._draw(fault), _flip)
            return update(norm)

        updates.step = struck

    def enospc(self, fault: Fault) -> None:
        """Have the kernel refuse what the writer process writes, until the next save."""
        self._run.checkpoints._settle(wait=True)  # the save before is not meant
        pid = self._run.checkpoints.writer_pid
        before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_TINY_FILE_BYTES, before[1]))
        self._limited = pid, before

    def _lift_limit(self) -> None:
        if self._limited is not None:
            self._run.checkpoints._settle(wait=True)
            pid, before = self._limited
            self._limited = None
            resource.prlimit(pid, resource.RLIMIT_FSIZE, before)

    def writer_death(self, fault: Fault) -> None:
        os.kill(self._run.checkpoints.writer_pid, signal.SIGKILL)

    def loader_death(self, fault: Fault) -> None:
        from hunyuan_train.data.child_process import decoding_processes

        loader = self._run.state.loader
        if pids := decoding_processes():
            os.kill(self._draw(fault).choice(pids), signal.SIGKILL)
            return
        for store in loader._stores:
            store.load = _ends_a_thread(loader._stores)


def _ends_a_thread(stores: list[Any]) -> Callable[..., Any]:
    def load(number: int, variant: int) -> None:
        for store in stores:
            vars(store).pop("load", None)
        raise _WorkerEnds

    return load


def _change(
    tensors: Mapping[str, Tensor], draw: random.Random, how: Callable[[Tensor, random.Random], None]
) -> None:
    """Change one element of what this rank stores."""
    parts = {name: t.to_local() if isinstance(t, DTensor) else t for name, t in tensors.items()}
    name = draw.choice(sorted(name for name, part in parts.items() if part.numel()))
    part = parts[name].detach()
    place = [draw.randrange(length) for length in part.shape]
    element = part[(*map(slice, place, [i + 1 for i in place]),)] if place else part
    value = element.clone().reshape(1)
    before = value.item()
    how(value, draw)
    with torch.no_grad():
        element.copy_(value.reshape(element.shape))
    log.warning("drill: %s%s is %g instead of %g", name, place, value.item(), before)


def _flip(value: Tensor, draw: random.Random) -> None:
    data = value.view(torch.uint8)
    data[draw.randrange(data.numel())] ^= 1 << draw.randrange(8)


def _spoil(value: Tensor, draw: random.Random) -> None:
    value.fill_(float("nan"))


def _raise(fault: Fault) -> None:
    raise DrillError(f"drill: an exception in {fault.phase} of step {fault.step}")


def _loop(fault: Fault) -> None:
    while True:
        pass


def _shard(folder: Path, rank: int) -> Path:
    """Return the file that a rank has written, or the first if it has written none."""
    own = folder / f"__{rank}_0.distcp"
    return own if own.exists() else min(folder.glob("*.distcp"))


def _tear(folder: Path, rank: int, draw: random.Random) -> None:
    shard = _shard(folder, rank)
    os.truncate(shard, shard.stat().st_size // 2)


def _corrupt(folder: Path, rank: int, draw: random.Random) -> None:
    with _shard(folder, rank).open("r+b") as file:
        place = draw.randrange(os.fstat(file.fileno()).st_size)
        byte = os.pread(file.fileno(), 1, place)[0] ^ 1 << draw.randrange(8)
        os.pwrite(file.fileno(), bytes([byte]), place)


def _delete(folder: Path, rank: int, draw: random.Random) -> None:
    _shard(folder, rank).unlink()


def _repeat_oldest(folder: Path, rank: int, draw: random.Random) -> None:
    oldest = min(folder.parent.glob("step-" + "[0-9]" * 8))
    copy = folder.parent / ".copy"
    shutil.copytree(oldest, copy)
    copy.rename(folder.with_name(f"step-{int(folder.name[5:]) + 1:08d}"))


_WRITER = {FaultKind.enospc, FaultKind.writer_death}

_ENDS: dict[FaultKind, Callable[[Fault], Any]] = {
    FaultKind.sigkill: lambda _: os.kill(os.getpid(), signal.SIGKILL),
    FaultKind.sigsegv: lambda _: ctypes.string_at(0),
    FaultKind.abort: lambda _: os.abort(),
    FaultKind.exception: _raise,
    FaultKind.sigstop: lambda _: os.kill(os.getpid(), signal.SIGSTOP),
    FaultKind.gil: lambda _: ctypes.PyDLL(None).sleep(_FOREVER_S),
    FaultKind.loop: _loop,
}
_STORAGE: dict[FaultKind, Callable[[Path, int, random.Random], None]] = {
    FaultKind.torn: _tear,
    FaultKind.corrupt: _corrupt,
    FaultKind.missing: _delete,
    FaultKind.stale_pointer: _repeat_oldest,
}
_OTHERS: dict[FaultKind, Callable[[_Drill, Fault], None]] = {
    FaultKind.slow: _Drill.slow,
    FaultKind.flip_parameter: _Drill.flip_parameter,
    FaultKind.flip_moment: _Drill.flip_moment,
    FaultKind.flip_gradient: _Drill.flip_gradient,
    FaultKind.flip_wire: _Drill.flip_wire,
    FaultKind.nan: _Drill.nan,
    FaultKind.enospc: _Drill.enospc,
    FaultKind.writer_death: _Drill.writer_death,
    FaultKind.loader_death: _Drill.loader_death,
}

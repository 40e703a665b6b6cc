"""The device a process computes on, and the few calls that differ between devices."""

import os
import time
from dataclasses import dataclass
from typing import Self

import torch


def resolve_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn ``auto``, ``cpu`` or ``cuda`` into this process's device.

    Raises:
        ValueError: if CUDA is asked for and this machine has none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(
                "run.device=cuda, but torch sees no CUDA device here; "
                "use run.device=cpu or install a CUDA build of torch"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        return device
    raise ValueError(f"run.device={name} is not a device; choose from auto cpu cuda")


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work, so that a clock read after it means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process has held: of the device on CUDA, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def total_memory_bytes(device: torch.device) -> int:
    """Return the memory to plan with: of the device on CUDA, of the whole machine on a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What one rank has to plan with."""

    memory_bytes: float
    """Of its device; on a CPU its share of the machine's memory."""
    host_bytes: float
    """Of the whole machine, for all ranks on it."""
    is_gpu: bool = True

    @classmethod
    def here(cls, device: torch.device, ranks: int) -> Self:
        """Return what a rank has on this machine, one of ``ranks``."""
        memory, is_gpu = total_memory_bytes(device), device.type == "cuda"
        host = total_memory_bytes(torch.device("cpu"))
        return cls(
            memory_bytes=memory if is_gpu else memory / ranks, host_bytes=host, is_gpu=is_gpu
        )


class Stopwatch:
    """Times stretches of queued work without waiting for them.

    On CUDA it places events in the stream; on a CPU it reads the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[float | torch.cuda.Event] = []

    def mark(self) -> None:
        """End a stretch, if one runs, and begin the next."""
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def seconds(self) -> list[float]:
        """Return the lengths of the stretches; on CUDA call it after :func:`synchronize`."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if not self._cuda:
            return [after - before for before, after in pairs]  # pyright: ignore[reportOperatorIssue]
        return [before.elapsed_time(after) / 1000 for before, after in pairs]  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

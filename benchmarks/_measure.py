"""What the scripts of this folder that run on a GPU share: clocks, rates of the device, figures."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hunyuan_train.observability.flops import peak_tflops

FIGURE_S = 3.0
"""About how long one figure is repeated."""
MOST_REPEATS = 20


def pick_device(name: str) -> torch.device:
    """Return the device of this name; auto is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def machine(device: torch.device) -> dict[str, Any]:
    """Describe where the figures come from."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "threads": torch.get_num_threads(), "torch": torch.__version__}


def once(action: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds of one call, by the device's own clock."""
    if device.type != "cuda":
        started = time.perf_counter()
        action()
        return time.perf_counter() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    action()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000


def seconds(action: Callable[[], Any], device: torch.device, repeats: int = 0) -> float:
    """Return the median seconds of a call after a first one; ``repeats`` of 0 take 3 s."""
    once(action, device)
    found = [once(action, device)]
    wanted = repeats or max(2, min(MOST_REPEATS, round(FIGURE_S / max(found[0], 1e-6))))
    found += [once(action, device) for _ in range(wanted - 1)]
    return statistics.median(found)


def matmul_tflops(device: torch.device, quick: bool) -> float:
    """Return the best TFLOP/s of products of two square matrices, bf16 on CUDA."""
    cuda = device.type == "cuda"
    size, calls = (8192, 10) if cuda else (256, 1)
    dtype = torch.bfloat16 if cuda else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(calls):
            left @ right

    once(products, device)
    best = min(once(products, device) for _ in range(3 if quick else 20))
    return calls * 2 * size**3 / best / 1e12


def copy_gbs(device: torch.device, quick: bool) -> float:
    """Return GB/s read and written by a copy within the device's memory."""
    source = torch.empty(2**31 if device.type == "cuda" else 2**24, dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    best = min(once(lambda: target.copy_(source), device) for _ in range(3 if quick else 20))
    return 2 * source.nbytes / best / 1e9


def link_gbs(device: torch.device, quick: bool) -> tuple[float, float]:
    """Return GB/s to and from pinned memory of the host; on a CPU those of plain copies."""
    cuda = device.type == "cuda"
    here = torch.empty(2**30 if cuda else 2**24, dtype=torch.uint8, device=device)
    there = torch.empty(here.shape, dtype=torch.uint8, pin_memory=cuda)
    repeats = 2 if quick else 5
    out = min(once(lambda: there.copy_(here, non_blocking=True), device) for _ in range(repeats))
    back = min(once(lambda: here.copy_(there, non_blocking=True), device) for _ in range(repeats))
    return here.nbytes / out / 1e9, here.nbytes / back / 1e9


def sheet_tflops(device: torch.device) -> float | None:
    """Return the data sheet's bf16 peak of a known GPU."""
    peak = peak_tflops(device) if device.type == "cuda" else None
    return peak.tflops if peak is not None and peak.source == "data sheet" else None


def reset_peak(device: torch.device) -> None:
    """Give unused memory back and forget the most that was allocated."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Return the most memory that tensors took at a time, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.max_memory_allocated(device) / 2**30


def is_full(error: BaseException) -> bool:
    """Return whether the device's memory was too small."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower()


def failure(error: BaseException) -> dict[str, Any]:
    """Return the figure of something that should have worked."""
    return {"failed": f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]}


def at_least(value: float, target: float, **more: Any) -> dict[str, Any]:
    """Return a figure that should be high."""
    return {"value": value, "target": f">= {target:g}", "holds": value >= target, **more}


def at_most(value: float, target: float, **more: Any) -> dict[str, Any]:
    """Return a figure that should be low."""
    return {"value": value, "target": f"<= {target:g}", "holds": value <= target, **more}


@dataclass
class Report:
    """Figures that are printed as they come, one JSON object per line, and together at the end."""

    benchmark: str
    device: torch.device
    minutes: float = 0.0
    """After so many, ``late`` says so; 0 is never."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    def add(self, name: str, figure: dict[str, Any]) -> None:
        """Keep a figure and print it."""
        self.figures[name] = figure
        print(json.dumps({"benchmark": self.benchmark, "figure": name, **figure}), flush=True)

    def value(self, name: str) -> float | None:
        """Return the number of a figure, None where there is none."""
        return self.figures.get(name, {}).get("value")

    @property
    def late(self) -> bool:
        """Whether the time is up."""
        return 0 < self.minutes * 60 < time.monotonic() - self.started

    def finish(self) -> None:
        """Print all figures as one JSON object; exit with 1 if a figure failed."""
        whole = {"benchmark": self.benchmark, "machine": machine(self.device)}
        print(json.dumps({**whole, "figures": self.figures}), flush=True)
        if any("failed" in figure for figure in self.figures.values()):
            sys.exit(1)

"""Time a stack of double and single blocks, forward and backward, beside diffusers' blocks.

One double and two single blocks, the model's ratio, at the widths of the 13B model, in bf16, as
``parallelize`` lays them out for one GPU: for every sequence length, attention kernel and recompute
mode, and for the fastest kernel also without fused kernels and with ``torch.compile``. A point has

- value: model FLOPs per second, in TFLOP/s; ms and peak GiB (of tensors, weights included)
- mfu: model FLOPs over the measured bf16 matmul peak, mfu_sheet: over the data sheet's
- hfu: all FLOPs that were computed, those of recompute too, over the measured peak

diffusers' blocks have the same weights and inputs and torch's attention. ``speedup`` is our fastest
TFLOP/s over theirs with as much kept (none), or where that does not fit, with theirs recomputed.
``difference`` is that of the two outputs over what the blocks changed. What does not fit is a
figure too: {"out_of_memory": true}. On a CPU sizes are tiny.

    python benchmarks/blocks.py --only 30616 --minutes 9
    python benchmarks/blocks.py --quick
"""

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _measure import (
    Report,
    at_least,
    failure,
    is_full,
    matmul_tflops,
    peak_gib,
    pick_device,
    reset_peak,
    seconds,
    sheet_tflops,
)
from _stack import (
    REAL,
    SEQUENCES,
    TEXT,
    TINY,
    TINY_TEXT,
    Rows,
    computed_flops,
    our_stack,
    run_ours,
    run_theirs,
    stack_flops,
    their_stack,
    train,
)
from torch import Tensor, nn

from hunyuan_kernels import dispatch
from hunyuan_train.memory.config import MemoryConfig, Recompute
from hunyuan_train.memory.recompute import set_recompute
from hunyuan_train.parallel.local_attention import BACKENDS, fix_backends

SPEEDUP, SHARE, LONG = 1.35, 0.6, 30_616
MODES = (Recompute.none, Recompute.selective, Recompute.full)


@dataclass(frozen=True)
class Bench:
    """What all points share."""

    report: Report
    repeats: int
    peak: float
    """Measured TFLOP/s of a matrix product."""
    sheet: float | None

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.report.device

    @property
    def dtype(self) -> torch.dtype:
        """What blocks compute in."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def point(
        self,
        name: str,
        tokens: int,
        mode: Recompute,
        model: nn.Module,
        forward: Callable[[], Tensor],
        rows: Rows,
    ) -> None:
        """Measure one figure, unless it is too late or does not fit."""
        if self.report.late:
            return self.report.add(name, {"skipped": "the time was up"})
        cfg, txt = (REAL, TEXT) if self.device.type == "cuda" else (TINY, TINY_TEXT)
        flops = stack_flops(cfg, tokens, txt)
        reset_peak(self.device)
        try:
            took = seconds(lambda: train(model, rows, forward), self.device, self.repeats)
        except (RuntimeError, NotImplementedError) as error:
            full = is_full(error)
            return self.report.add(name, {"out_of_memory": True} if full else failure(error))
        finally:
            model.zero_grad(set_to_none=True)
        rate, peak = flops.training / took / 1e12, peak_gib(self.device)
        figure = {
            "value": rate,
            "unit": "TFLOP/s",
            "ms": 1000 * took,
            "mfu": rate / self.peak,
            "mfu_sheet": rate / self.sheet if self.sheet else None,
            "hfu": computed_flops(flops, mode) / took / 1e12 / self.peak,
            "peak_gib": peak,
        }
        return self.report.add(name, figure)


def kernels_here(rows: Rows, heads: int) -> list[str]:
    """Return the attention kernels that take these rows, the default one first."""
    q = rows.img.detach().unflatten(-1, (heads, -1))
    names = [n for n, kernel in BACKENDS.items() if n != "reference" and kernel.takes(q, q, False)]
    return names or ["reference"]


def measure_ours(bench: Bench, tokens: int, rows: Rows, compile: bool) -> None:
    """Measure our blocks with every kernel, or compiled with the fastest one."""
    cfg = REAL if bench.device.type == "cuda" else TINY
    model = our_stack(cfg, bench.device, bench.dtype, MemoryConfig(compile=compile))
    found = fastest(bench.report, tokens)
    kernels = kernels_here(rows, cfg.num_heads)
    best = found.split("_")[1] if found else kernels[0]
    for kernel in [best] if compile else kernels:
        before = fix_backends({False: kernel})
        for mode in MODES:
            set_recompute(model, mode)
            name = f"s{tokens}_{kernel}_{mode.value}" + ("_compiled" if compile else "")
            bench.point(name, tokens, mode, model, lambda: run_ours(model, rows), rows)
        fix_backends(before)
    if compile:
        return
    found = fastest(bench.report, tokens)
    kernel = found.split("_")[1] if found else kernels[0]
    before = fix_backends({False: kernel})
    dispatch.set_mode("off")
    for mode in MODES[:2]:
        set_recompute(model, mode)
        name = f"s{tokens}_{kernel}_{mode.value}_unfused"
        bench.point(name, tokens, mode, model, lambda: run_ours(model, rows), rows)
    dispatch.set_mode("auto")
    fix_backends(before)


def measure_theirs(bench: Bench, tokens: int, rows: Rows) -> None:
    """Measure diffusers' blocks, and how far their output is from ours."""
    cfg = REAL if bench.device.type == "cuda" else TINY
    try:
        theirs = their_stack(cfg, bench.device, bench.dtype)
    except ImportError as error:
        bench.report.add(f"s{tokens}_diffusers_none", {"skipped": str(error)})
        return
    for mode, again in ((Recompute.none, False), (Recompute.full, True)):
        name = f"s{tokens}_diffusers_{mode.value}"
        bench.point(
            name, tokens, mode, theirs, lambda again=again: run_theirs(theirs, rows, again), rows
        )
    if tokens == min(SEQUENCES) or bench.device.type != "cuda":
        ours = our_stack(cfg, bench.device, bench.dtype, MemoryConfig())
        with torch.no_grad():
            wanted, found = run_theirs(theirs, rows, False), run_ours(ours, rows)
            given = torch.cat([rows.img, rows.txt], dim=1)
            error = (found - wanted).float().norm() / (wanted - given).float().norm()
        bench.report.add(f"s{tokens}_difference", {"value": float(error)})


def fastest(report: Report, tokens: int, *parts: str, theirs: bool = False) -> str | None:
    """Return the name of our fastest point of a length whose name has all ``parts``."""
    names = [
        name
        for name in report.figures
        if name.startswith(f"s{tokens}_")
        and ("diffusers" in name) == theirs
        and "ms" in report.figures[name]
        and all(part in name.split("_") for part in parts)
    ]
    return max(names, key=lambda name: report.figures[name]["value"], default=None)


def compare(report: Report, tokens: int, targets: bool) -> None:
    """Add what the points of one length come to."""
    theirs = fastest(report, tokens, "none", theirs=True)
    ours = fastest(report, tokens, "none") if theirs else None
    theirs = theirs or fastest(report, tokens, "full", theirs=True)
    ours = ours or fastest(report, tokens)
    if ours and theirs:
        ratio = report.figures[ours]["value"] / report.figures[theirs]["value"]
        figure = {"ours": ours, "theirs": theirs}
        whole = at_least(ratio, SPEEDUP, **figure) if targets else {"value": ratio, **figure}
        report.add(f"s{tokens}_speedup", whole)
    selective = fastest(report, tokens, "selective")
    if selective and tokens >= LONG:
        share = report.figures[selective]["mfu"]
        report.add(f"s{tokens}_mfu_selective", at_least(share, SHARE, ours=selective))


def main() -> None:
    """Measure every length; print every figure, and all of them last."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--only", type=int, action="append", help="this length alone; repeatable")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no figure after these")
    parser.add_argument("--compile", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--quick", action="store_true", help="one repeat, tiny on a CPU")
    options = parser.parse_args()
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    report = Report("blocks", device, options.minutes)
    report.add("matmul_peak", {"value": matmul_tflops(device, options.quick), "unit": "TFLOP/s"})
    peak, sheet = report.value("matmul_peak") or 1.0, sheet_tflops(device)
    report.add("data_sheet_peak", {"value": sheet})
    bench = Bench(report, 1 if options.quick else 0, peak, sheet)
    compile = cuda if options.compile == "auto" else options.compile == "on"
    for tokens in options.only or (SEQUENCES if cuda else (96, 160)):
        cfg, txt = (REAL, TEXT) if cuda else (TINY, TINY_TEXT)
        rows = Rows.random(cfg, tokens, txt, device, bench.dtype)
        measure_ours(bench, tokens, rows, compile=False)
        measure_theirs(bench, tokens, rows)
        if compile:
            measure_ours(bench, tokens, rows, compile=True)
        else:
            report.add(f"s{tokens}_compiled", {"skipped": "takes minutes on a CPU: --compile on"})
        gc.collect()
        compare(report, tokens, targets=cuda)
    report.finish()


if __name__ == "__main__":
    main()

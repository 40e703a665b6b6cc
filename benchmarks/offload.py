"""Measure what activation offload costs: a stack of blocks with it and without, in turns.

Two double and four single blocks at the widths of the 13B model, in bf16, with selective recompute.
For every sequence length

- cost: time with offload over the time without, less 1 (median of pairs)
- gib: what went to the host and came back per forward and backward; host_gib: the pages there are
- needed_gbs: those bytes over the time of a forward, which the link has to carry
- saved_gib: the difference of the most memory that tensors took at a time

The link itself is measured with pinned memory, each way. On a CPU the same code copies at once, at
tiny sizes.

    python benchmarks/offload.py --only 30616
    python benchmarks/offload.py --quick
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from _measure import (
    FIGURE_S,
    Report,
    at_most,
    failure,
    is_full,
    link_gbs,
    once,
    peak_gib,
    pick_device,
    reset_peak,
)
from _stack import REAL, SEQUENCES, TEXT, TINY, TINY_TEXT, Rows, our_stack, run_ours, train
from torch import nn

from hunyuan_train.memory.config import MemoryConfig, Recompute, Switch
from hunyuan_train.memory.offload import Offload
from hunyuan_train.memory.recompute import set_recompute

COST, LONG = 0.03, 30_616
BLOCKS = {"num_double_blocks": 2, "num_single_blocks": 4}


def offload_of(model: nn.Module) -> Offload:
    """Return who moves the tensors of a model's blocks."""
    return next(iter(model.single_blocks)).forward.offload  # pyright: ignore


def count_bytes(offload: Offload, step: Any) -> int:
    """Return the bytes that one step copies to the host."""
    sent: list[int] = []
    copy = offload.outward.copy
    offload.outward.copy = lambda pairs: sent.extend(s.nbytes for _, s in pairs) or copy(pairs)
    step()
    del offload.outward.copy
    return sum(sent)


def measure(report: Report, tokens: int, quick: bool) -> None:
    """Add the figures of one length."""
    device = report.device
    cuda = device.type == "cuda"
    cfg, txt = (REAL, TEXT) if cuda else (TINY, TINY_TEXT)
    cfg = replace(cfg, **BLOCKS)
    dtype = torch.bfloat16 if cuda else torch.float32
    memory = MemoryConfig(
        recompute=Recompute.selective, offload=Switch.on, offload_min_mib=1.0 if cuda else 0.0
    )
    try:
        model = our_stack(cfg, device, dtype, memory)
        rows = Rows.random(cfg, tokens, txt, device, dtype)

        def step() -> None:
            train(model, rows, lambda: run_ours(model, rows))

        peaks = {}
        for moves in (False, True, True):  # the second time with pages that are there
            set_recompute(model, Recompute.selective, offload=moves)
            reset_peak(device)
            took = once(step, device)
            peaks[moves] = peak_gib(device)
        repeats = 2 if quick else max(3, min(20, round(FIGURE_S / took)))
        pairs = []
        for turn in range(repeats):
            pair = {}
            for moves in (turn % 2 == 0, turn % 2 == 1):
                set_recompute(model, Recompute.selective, offload=moves)
                pair[moves] = once(step, device)
            pairs.append(pair)
        set_recompute(model, Recompute.selective)
        offload = offload_of(model)
        moved = count_bytes(offload, step)
    except (RuntimeError, NotImplementedError) as error:
        return report.add(
            f"s{tokens}_cost", {"out_of_memory": True} if is_full(error) else failure(error)
        )
    without = statistics.median(pair[False] for pair in pairs)
    cost = statistics.median(pair[True] / pair[False] for pair in pairs) - 1
    peak, least = peaks[False], peaks[True]
    more = {
        "ms": 1000 * statistics.median(pair[True] for pair in pairs),
        "without_ms": 1000 * without,
        "gib": moved / 2**30,
        # With recompute a forward is about a quarter of it.
        "needed_gbs": moved / (without / 4) / 1e9,
        "host_gib": offload.pages.count * offload.pages.page_bytes / 2**30,
        "saved_gib": peak - least if peak is not None and least is not None else None,
        "active": offload.active,
    }
    long = cuda and tokens >= LONG
    report.add(f"s{tokens}_cost", at_most(cost, COST, **more) if long else {"value": cost, **more})
    return None


def main() -> None:
    """Measure every length; print every figure, and all of them last."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--only", type=int, action="append", help="this length alone; repeatable")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no figure after these")
    parser.add_argument("--quick", action="store_true", help="few repeats, tiny on a CPU")
    options = parser.parse_args()
    device = pick_device(options.device)
    report = Report("offload", device, options.minutes)
    out, back = link_gbs(device, options.quick)
    report.add("link_to_host", {"value": out, "unit": "GB/s"})
    report.add("link_from_host", {"value": back, "unit": "GB/s"})
    for tokens in options.only or (SEQUENCES if device.type == "cuda" else (96,)):
        if report.late:
            report.add(f"s{tokens}_cost", {"skipped": "the time was up"})
        else:
            measure(report, tokens, options.quick)
    report.finish()


if __name__ == "__main__":
    main()

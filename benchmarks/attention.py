"""Time attention, forward and backward, with every kernel that is here, beside torch's function.

At the widths of the 13B model, 24 heads of 128 in bf16, one sample, without padding and with 128
padded tokens. ``sdpa`` is ``F.scaled_dot_product_attention`` through autograd, as torch chooses its
kernel. A figure has

- value: computed TFLOP/s, 14 S^2 h of them (4 forward, 10 backward, which computes scores again)
- forward_ms, backward_ms and ms of both
- share: of the measured bf16 matmul peak

``error_<kernel>`` is the largest error of output, log-sum-exp and gradients over the largest value,
against the float64 reference at a small size; the gradients are those of two halves of the keys
from the output over all, as in a ring. On a CPU sizes are tiny and float32.

    python benchmarks/attention.py
    python benchmarks/attention.py --only 30616 --minutes 5
    python benchmarks/attention.py --quick
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _measure import (
    Report,
    at_least,
    at_most,
    failure,
    is_full,
    matmul_tflops,
    peak_gib,
    pick_device,
    reset_peak,
    seconds,
)
from torch import Tensor
from torch.nn import functional

from hunyuan_train.parallel.attention_choice import errors_of
from hunyuan_train.parallel.local_attention import (
    BACKENDS,
    attend_backward_with,
    attend_with,
)

SEQUENCES = (4_608, 17_792, 30_616, 67_576, 119_056)
TINY_SEQUENCES = (64, 160)
HEADS, WIDTH = 24, 128
TINY_HEADS, TINY_WIDTH = 2, 32
PADDED, TINY_PADDED = 128, 16
SMALL = 300
ERROR = {torch.bfloat16: 3e-2, torch.float32: 1e-3}
SHARE, LONG = 0.6, 30_616


@dataclass(frozen=True)
class Rows:
    """One attention's inputs."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Bench:
    """What all points share."""

    report: Report
    repeats: int
    peak: float
    """Measured TFLOP/s of a matrix product."""

    @property
    def cuda(self) -> bool:
        """Whether sizes are those of the model."""
        return self.report.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """What blocks compute in."""
        return torch.bfloat16 if self.cuda else torch.float32

    def rows(self, samples: int, tokens: int, masked: bool) -> Rows:
        """Return random inputs; the last sample has padding behind it if ``masked``."""
        heads, width = (HEADS, WIDTH) if self.cuda else (TINY_HEADS, TINY_WIDTH)
        device = self.report.device
        shape = (samples, tokens, heads, width)
        q, k, v, grad = (torch.randn(shape, device=device, dtype=self.dtype) for _ in range(4))
        mask = None
        if masked:
            mask = torch.ones(samples, tokens, dtype=torch.bool, device=device)
            mask[-1, -(PADDED if self.cuda else TINY_PADDED) :] = False
        return Rows(q, k, v, grad, mask)

    def point(
        self, name: str, rows: Rows, forward: Callable[[], Any], backward: Callable[[Any], Any]
    ) -> None:
        """Measure one figure, unless it is too late or does not fit."""
        if self.report.late:
            return self.report.add(name, {"skipped": "the time was up"})
        device = self.report.device
        reset_peak(device)
        try:
            first = seconds(forward, device, self.repeats)
            results = forward()
            second = seconds(lambda: backward(results), device, self.repeats)
        except (RuntimeError, NotImplementedError) as error:
            full = is_full(error)
            return self.report.add(name, {"out_of_memory": True} if full else failure(error))
        batch, tokens, heads, width = rows.q.shape
        rate = 14 * batch * tokens**2 * heads * width / (first + second) / 1e12
        more = {
            "unit": "TFLOP/s",
            "ms": 1e3 * (first + second),
            "forward_ms": 1e3 * first,
            "backward_ms": 1e3 * second,
            "share": rate / self.peak,
            "peak_gib": peak_gib(device),
        }
        return self.report.add(name, {"value": rate, **more})


def kernels_here(rows: Rows) -> list[str]:
    """Return the kernels that take these inputs; the reference only without a GPU."""
    masked = rows.mask is not None
    names = [name for name, kernel in BACKENDS.items() if kernel.takes(rows.q, rows.k, masked)]
    return [n for n in names if n != "reference" or rows.q.device.type == "cpu"]


def measure_errors(bench: Bench) -> None:
    """Compare every kernel with the reference, with padding."""
    rows = bench.rows(2, SMALL, masked=True)
    for name in kernels_here(rows):
        try:
            found = errors_of(BACKENDS[name], rows.q, rows.k, rows.v, rows.grad, rows.mask)
        except (RuntimeError, NotImplementedError, AssertionError) as error:
            bench.report.add(f"error_{name}", failure(error))
            continue
        by_part = {part.replace(" ", "_"): error for part, error in found.items()}
        figure = at_most(max(found.values()), ERROR[bench.dtype], **by_part)
        bench.report.add(f"error_{name}", figure)


def measure_kernel(bench: Bench, name: str, figure: str, rows: Rows) -> None:
    """Time one kernel."""
    backend = BACKENDS[name]

    def forward() -> tuple[Tensor, Tensor]:
        return attend_with(backend, rows.q, rows.k, rows.v, rows.mask)

    def backward(results: tuple[Tensor, Tensor]) -> object:
        return attend_backward_with(backend, rows.grad, rows.q, rows.k, rows.v, rows.mask, *results)

    bench.point(figure, rows, forward, backward)


def measure_sdpa(bench: Bench, figure: str, rows: Rows) -> None:
    """Time torch's function as it is usually called."""
    leaves = [t.transpose(1, 2).detach().requires_grad_() for t in (rows.q, rows.k, rows.v)]
    mask = None if rows.mask is None else rows.mask[:, None, None, :]

    def forward() -> Tensor:
        return functional.scaled_dot_product_attention(
            leaves[0], leaves[1], leaves[2], attn_mask=mask
        )

    def backward(out: Tensor) -> object:
        return torch.autograd.grad(out, leaves, rows.grad.transpose(1, 2), retain_graph=True)

    bench.point(figure, rows, forward, backward)


def compare(bench: Bench, tokens: int, names: list[str]) -> None:
    """Add the fastest kernel's figures of one length."""
    values = {name: bench.report.value(f"s{tokens}_{name}") for name in names}
    measured = {name: value for name, value in values.items() if value is not None}
    if not measured:
        return
    best = max(measured, key=measured.__getitem__)
    share = measured[best] / bench.peak
    if bench.cuda and tokens >= LONG:
        bench.report.add(f"share_s{tokens}", at_least(share, SHARE, kernel=best))
    sdpa = bench.report.value(f"s{tokens}_sdpa")
    if sdpa:
        figure = {"value": measured[best] / sdpa, "kernel": best}
        bench.report.add(f"over_sdpa_s{tokens}", figure)


def main() -> None:
    """Measure every length and print the JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--quick", action="store_true", help="few repeats")
    parser.add_argument("--only", type=int, nargs="*", default=[], help="these lengths alone")
    parser.add_argument("--minutes", type=float, default=0.0, help="start nothing after these")
    args = parser.parse_args()
    device = pick_device(args.device)
    report = Report("attention", device, args.minutes)
    bench = Bench(report, 2 if args.quick else 0, matmul_tflops(device, args.quick))
    report.add("matmul_peak", {"value": bench.peak, "unit": "TFLOP/s"})
    measure_errors(bench)
    for tokens in args.only or (SEQUENCES if bench.cuda else TINY_SEQUENCES):
        for masked in (False, True):
            rows = bench.rows(1, tokens, masked)
            names, padded = kernels_here(rows), "_padded" if masked else ""
            for name in names:
                measure_kernel(bench, name, f"s{tokens}_{name}{padded}", rows)
            measure_sdpa(bench, f"s{tokens}_sdpa{padded}", rows)
            if not masked:
                compare(bench, tokens, names)
    report.finish()


if __name__ == "__main__":
    main()

"""Measure the fused kernels against the device's copy bandwidth and against eager PyTorch.

For each kernel at the widths of the 13B model and each sequence length:

- value: GB/s of forward and backward, the bytes by ``hunyuan_kernels.traffic``
- share: value over the bandwidth of a copy measured in the same run
- speedup: time of the eager reference over the kernel's

gelu_linear2 is two matrix products, so its figure is TFLOP/s and its share is of the measured
matmul peak. On a CPU there are no kernels: references run at tiny sizes, and then every kernel once
in Triton's interpreter, compared with its reference.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --quick
"""

import argparse
import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
from _measure import (
    Report,
    at_least,
    copy_gbs,
    failure,
    is_full,
    matmul_tflops,
    pick_device,
    reset_peak,
    seconds,
)
from torch import Tensor
from torch.utils import _pytree as pytree

from hunyuan_kernels import dispatch
from hunyuan_kernels.traffic import bytes_moved

TARGET = 0.8
SEQUENCES = (4608, 30_616, 119_056)
ADAMW = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}


def sizes_of(op: str, tokens: int, real: bool) -> dict[str, int]:
    """Return the sizes of an op by letter, as ``bytes_moved`` takes them."""
    heads, width = (24, 128) if real else (2, 16)
    hidden = heads * width
    if op == "adamw_ema":
        return {"N": 2**28 if real else 2**10}
    if op in ("qk_norm_rope", "lse_merge"):
        return {"B": 1, "S": tokens, "A": heads, "E": width}
    sizes = {"B": 1, "S": tokens, "D": hidden}
    return sizes | ({"M": 4 * hidden} if op == "gelu_linear2" else {})


def arguments(
    op: str, sizes: Mapping[str, int], device: torch.device, dtype: torch.dtype
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments of an op, strided as in the model, and its keywords."""
    torch.manual_seed(0)

    def noise(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def leaf(*shape: int) -> Tensor:
        return noise(*shape).requires_grad_()

    n = dict(sizes)
    match op:
        case "norm_modulate":
            return (leaf(n["B"], n["S"], n["D"]), *(leaf(n["B"], n["D"]) for _ in range(2))), {}
        case "gated_residual":
            tokens = (n["B"], n["S"], n["D"])
            return (leaf(*tokens), leaf(n["B"], n["D"]), leaf(*tokens)), {}
        case "qk_norm_rope":
            packed = noise(n["B"], n["S"], 3, n["A"], n["E"])
            q, k = (packed[:, :, i].requires_grad_() for i in range(2))
            angles = noise(n["S"], n["E"] // 2, dtype=torch.float32)
            return (q, k, leaf(n["E"]), leaf(n["E"]), angles.cos(), angles.sin()), {}
        case "gelu_linear2":
            rows = (n["B"], n["S"])
            weight = leaf(n["D"], n["D"] + n["M"])
            return (leaf(*rows, n["D"]), leaf(*rows, n["M"]), weight, leaf(n["D"])), {}
        case "lse_merge":
            heads, lse = (n["B"], n["S"], n["A"], n["E"]), (n["B"], n["A"], n["S"])
            wide = torch.float32
            return (noise(*heads, dtype=wide), noise(*lse, dtype=wide), noise(*heads),
                    noise(*lse, dtype=wide)), {}  # fmt: skip
    assert op == "adamw_ema", op
    wide = [[noise(n["N"], dtype=torch.float32).abs()] for _ in range(4)]
    param, first, second, ema = wide
    steps = [torch.ones((), device=device)]
    return (param, [noise(n["N"])], first, second, steps, ema), ADAMW | {"ema_decay": 0.999}


def calls_of(
    op: str, call: tuple[tuple[Any, ...], dict[str, Any]], backward: bool
) -> Callable[[], None]:
    """Return a forward of an op, with its backward or without."""
    function = getattr(importlib.import_module(f"hunyuan_kernels.ops.{op}.op"), op)
    args, kwargs = call
    leaves = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]

    def run() -> None:
        outs = pytree.tree_leaves(function(*args, **kwargs))
        if backward and leaves:
            torch.autograd.grad(outs, leaves, grads)

    grads: list[Tensor] = []
    if leaves:
        with torch.no_grad():
            grads = [torch.randn_like(t) for t in pytree.tree_leaves(function(*args, **kwargs))]
    return run


def measure(report: Report, op: str, tokens: int, rates: tuple[float, float], quick: bool) -> None:
    """Add the figure of one op at one length; ``rates`` are copy GB/s and matmul TFLOP/s."""
    device = report.device
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    sizes = sizes_of(op, tokens, cuda)
    traffic = bytes_moved(op, sizes, dtype.itemsize)
    name = op if op == "adamw_ema" else f"{op}_s{tokens}"
    took: dict[str, float] = {}
    reset_peak(device)
    try:
        call = arguments(op, sizes, device, dtype)
        for mode in ("on", "off"):
            dispatch.set_mode(mode)
            took[mode] = seconds(calls_of(op, call, True), device, 2 if quick else 0)
    except (RuntimeError, NotImplementedError) as error:
        return report.add(name, {"out_of_memory": True} if is_full(error) else failure(error))
    finally:
        dispatch.set_mode("auto")
    products = op == "gelu_linear2"
    value = traffic.flops / 1e12 if products else traffic.fused.moved / 1e9
    value /= took["on"]
    share, unit = value / rates[products], "TFLOP/s" if products else "GB/s"
    more = {"unit": unit, "ms": 1000 * took["on"], "eager_ms": 1000 * took["off"]}
    more["speedup"] = took["off"] / took["on"]
    report.add(name, {"value": value, "share": share, **more})
    if cuda and not products:
        report.add(f"{name}_share", at_least(share, TARGET))
    return None


def interpret(report: Report) -> None:
    """Run every kernel in the interpreter and add whether it does what its reference does."""
    with mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        from hunyuan_kernels.testing import compare, interpreted

        with interpreted():
            for op in dispatch.OPS:
                importlib.import_module(f"hunyuan_kernels.ops.{op}.kernel")
                sizes = sizes_of(op, 5, False)
                args, kwargs = arguments(op, sizes, report.device, torch.float32)
                found = compare(op, *args, **kwargs)
                worst = max(found, key=lambda one: one.fused)
                figure = {"value": worst.fused, "eager": worst.eager, "tensor": worst.name}
                report.add(f"{op}_interpreted_error", figure | {"holds": all(d.ok for d in found)})


def main() -> None:
    """Measure every kernel; print every figure, and all of them last."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--only", choices=dispatch.OPS, help="this kernel alone")
    parser.add_argument("--minutes", type=float, default=0.0, help="start no figure after these")
    parser.add_argument("--quick", action="store_true", help="one length, few repeats")
    options = parser.parse_args()
    device = pick_device(options.device)
    cuda = device.type == "cuda"
    report = Report("kernels", device, options.minutes)
    report.add("copy_bandwidth", {"value": copy_gbs(device, options.quick), "unit": "GB/s"})
    report.add("matmul_peak", {"value": matmul_tflops(device, options.quick), "unit": "TFLOP/s"})
    rates = (report.value("copy_bandwidth") or 1.0, report.value("matmul_peak") or 1.0)
    lengths = SEQUENCES if cuda else (64,)
    for op in dispatch.OPS if options.only is None else (options.only,):
        for tokens in lengths[:1] if op == "adamw_ema" or options.quick else lengths:
            if report.late:
                report.add(f"{op}_s{tokens}", {"skipped": "the time was up"})
            else:
                measure(report, op, tokens, rates, options.quick)
    if not cuda and dispatch.HAS_TRITON:
        interpret(report)
    elif not cuda:
        report.add("interpreted_error", {"skipped": "triton is not installed"})
    report.finish()


if __name__ == "__main__":
    main()

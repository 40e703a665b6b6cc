"""Measure ring and Ulysses attention: bytes moved, transfer time hidden, cost of splitting.

On CPU four processes form a ring over gloo. What a ring sends does not depend on the device, so the
bytes and hops are checked against the closed form here. Four ranks share whatever cores there are,
and gloo needs cores to move bytes, so the share of the transfers that is hidden is measured under
the real kernels and again under a sleep of four times the longest transfer, which leaves the cores
free as a GPU would. The gradients' way home, the last transfer of the backward, has no compute left
to hide under and is not counted in that share.

On a GPU one device plays every rank of the ring in turn: the same chunks, hops and merges, without
the transfers, against one kernel over the whole 720p sequence. That is the price of splitting.

    python benchmarks/ring.py --quick
    python benchmarks/ring.py --device cuda
"""

import argparse
import json
import multiprocessing as mp
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from hunyuan_train.parallel import ring
from hunyuan_train.parallel.local_attention import attend, attend_backward, choose_backend
from hunyuan_train.parallel.ulysses import ContextCore

RANKS = 4
SPLIT_TARGET = 1.05
HIDDEN_TARGET = 0.9
WHOLE_TOKENS, WHOLE_HEADS, WHOLE_WIDTH = 119_056, 24, 128  # HunyuanVideo at 720p, 129 frames
RING_SIZES = (2, 4, 8)

Timed = Callable[[], Any]


class CountingTransfer(ring._Transfer):
    """Adds up what leaves this rank and how long it waits for what arrives."""

    sent_bytes: ClassVar[list[int]] = []
    waited_s: ClassVar[list[float]] = []

    def __init__(self, sent: Tensor, place: ring._Ring, tag: int) -> None:
        CountingTransfer.sent_bytes.append(sent.nbytes)
        super().__init__(sent, place, tag)

    def wait(self) -> Tensor:
        """Wait as the ring does, on the clock."""
        started = time.perf_counter()
        arrived = super().wait()
        CountingTransfer.waited_s.append(time.perf_counter() - started)
        return arrived


def seconds(action: Timed, device: str = "cpu") -> float:
    """Return the seconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def counted(action: Timed) -> tuple[Any, list[int], list[float]]:
    """Return what the action returns, and bytes and seconds waited of its transfers."""
    CountingTransfer.sent_bytes, CountingTransfer.waited_s = [], []
    dist.barrier()
    result = action()
    return result, CountingTransfer.sent_bytes, CountingTransfer.waited_s


def transfers_alone(place: ring._Ring, like: Tensor, dtype: torch.dtype, tag: int) -> float:
    """Return the seconds of every hop of a pair of tensors without compute, on the slowest rank."""
    buffer = torch.zeros((2, *like.shape), dtype=dtype)

    def shifts() -> None:
        for _ in range(place.size - 1):
            place.shift(buffer, tag).wait()

    dist.barrier()
    longest = torch.tensor(seconds(shifts))
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    return float(longest)


def sleep_instead(q: Tensor, pause: float) -> None:
    """Replace the kernels by a sleep; the numbers are meaningless."""
    out, lse = torch.zeros_like(q), torch.zeros(q.shape[0], q.shape[2], q.shape[1])

    def forward(*_: Any) -> tuple[Tensor, Tensor]:
        time.sleep(pause)
        return out.clone(), lse

    def backward(*_: Any) -> tuple[Tensor, Tensor, Tensor]:
        time.sleep(pause)
        return torch.zeros_like(q), out, out

    ring.attend, ring.attend_backward = forward, backward


def traffic(
    rank: int, world: int, shape: tuple[int, ...], sleep: bool, repeats: int
) -> dict[str, Any]:
    """Count one rank's transfers and time how much of them is hidden behind compute."""
    group = dist.group.WORLD
    assert group is not None
    place = ring._Ring.of(group)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    gradient = torch.ones(shape, dtype=torch.bfloat16)
    ring._Transfer = CountingTransfer
    results: dict[str, Any] = {"forward_hidden": [], "backward_hidden": []}
    for repeat in range(repeats + 1):
        keys = transfers_alone(place, k, k.dtype, ring._KEYS_TAG)
        gradients = transfers_alone(place, k, torch.float32, ring._GRADS_TAG)
        if sleep:
            sleep_instead(q.detach(), 4 * max(keys, gradients) / (world - 1))
        out, results["forward"], waited = counted(lambda: ring.ring_attention(q, k, v, None, group))
        grads, results["backward"], waited_backward = counted(
            lambda out=out: torch.autograd.grad(out, (q, k, v), gradient)
        )
        assert len(grads) == 3
        if repeat:  # the first connects the pairs
            can_hide = keys + gradients * (world - 2) / (world - 1)  # all but the way home
            results["forward_hidden"].append(1 - sum(waited) / keys)
            results["backward_hidden"].append(1 - sum(waited_backward[:-1]) / can_hide)
    return results


def speeds(rank: int, world: int, shape: tuple[int, ...], repeats: int) -> dict[str, list[float]]:
    """Time forward and backward of two ranks against SDPA in one process with two threads."""
    group = dist.group.WORLD
    cores = {"ring": ContextCore(group, None), "ulysses": ContextCore(None, group)}
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator, requires_grad=True) for _ in range(3)]
    mine = [t.detach().chunk(world, dim=1)[rank].clone().requires_grad_() for t in whole]

    def sdpa() -> None:
        q, k, v = (t.transpose(1, 2) for t in whole)
        functional.scaled_dot_product_attention(q, k, v).sum().backward()

    def split(core: ContextCore) -> None:
        core(mine[0], mine[1], mine[2], None).sum().backward()

    times: dict[str, list[float]] = {"sdpa": [], "ring": [], "ulysses": []}
    for _ in range(repeats + 1):
        if rank == 0:
            torch.set_num_threads(world)
            times["sdpa"].append(seconds(sdpa))
            torch.set_num_threads(1)
        for name, core in cores.items():
            dist.barrier()
            times[name].append(seconds(lambda core=core: split(core)))
    return {name: values[1:] for name, values in times.items()}


def rank_main(
    task: Callable[..., Any], rank: int, world: int, folder: str, args: tuple[Any, ...]
) -> None:
    """Run ``task`` as one rank and leave what it returns in the folder."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    result = task(rank, world, *args)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def in_processes(task: Callable[..., Any], world: int, *args: Any) -> list[Any]:
    """Return what ``task(rank, world, *args)`` returns in each of ``world`` processes."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch", "hunyuan_train.parallel.ulysses"])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=rank_main, args=(task, rank, world, folder, args))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a rank failed; its traceback is above")
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]


def holds(value: float, target: str, good: bool) -> dict[str, Any]:
    """Return a figure with its target."""
    return {"value": value, "target": target, "holds": good}


def cpu_figures(quick: bool) -> dict[str, Any]:
    """Measure over gloo."""
    repeats = 1 if quick else 9
    shape = (1, 128 if quick else 1024, 4, 64)
    ranks = in_processes(traffic, RANKS, shape, False, repeats)
    wide = in_processes(traffic, RANKS, (1, 128 if quick else 512, 16, 128), True, repeats)
    elements = 2 * shape[0] * shape[1] * shape[2] * shape[3]  # k and v of a chunk
    hops = RANKS - 1
    # bf16 keys on every hop; the backward adds float32 gradients on as many.
    wanted = {"forward": hops * 2 * elements, "backward": hops * (2 + 4) * elements}
    figures: dict[str, Any] = {}
    for name, size in wanted.items():
        sent = [sum(r[name]) for r in ranks]
        good = all(count == size for count in sent)
        figures[f"{name}_bytes_over_formula"] = holds(max(sent) / size, "== 1", good)
        figures[f"{name}_bytes_per_rank"] = {"value": max(sent)}
        count = hops if name == "forward" else 2 * hops
        figures[f"{name}_transfers"] = holds(
            len(ranks[0][name]), f"== {count}", len(ranks[0][name]) == count
        )
    for name in ("forward", "backward"):
        share = statistics.median(x for r in wide for x in r[f"{name}_hidden"])
        good = share >= HIDDEN_TARGET
        figures[f"{name}_hidden_under_sleep"] = holds(share, f">= {HIDDEN_TARGET}", good)
        share = statistics.median(x for r in ranks for x in r[f"{name}_hidden"])
        figures[f"{name}_hidden_under_kernels"] = {"value": share}
    tokens = 256 if quick else 4096
    times = in_processes(speeds, 2, (1, tokens, 4, 64), repeats)
    plain = times[0]["sdpa"]
    for name in ("ring", "ulysses"):
        slowest = (max(pair) for pair in zip(*(t[name] for t in times), strict=True))
        ratio = statistics.median(a / b for a, b in zip(slowest, plain, strict=True))
        figures[f"{name}2_over_sdpa"] = holds(ratio, "<= 1.15", ratio <= 1.15)
    return figures


@dataclass(frozen=True)
class _Here:
    """A transfer that has already arrived."""

    buffer: Tensor

    def wait(self) -> Tensor:
        return self.buffer


class LocalRing:
    """One rank of a ring whose other ranks live on the same device: hops without transfers.

    Keys arrive as the right chunk. Travelling gradients stay in one buffer, so only their sum over
    all chunks is right; the work is the same.
    """

    def __init__(self, rank: int, chunks: list[Tensor]) -> None:
        self.rank, self.size, self.chunks, self.hop = rank, len(chunks), chunks, 0

    def shift(self, buffer: Tensor, tag: int) -> _Here:
        """Hand over the keys of the next hop, or the gradients back."""
        if tag != ring._KEYS_TAG:
            return _Here(buffer)
        self.hop += 1
        return _Here(self.chunks[(self.rank - self.hop) % self.size])


def split_forward(chunks: list[Tensor], parts: list[list[Tensor]]) -> list[Any]:
    """Play every rank's forward; ``parts`` are the chunks of q, k and v."""
    return [
        ring._forward(LocalRing(r, chunks), q, k, v, None)  # pyright: ignore[reportArgumentType]
        for r, (q, k, v) in enumerate(zip(*parts, strict=True))
    ]


def split_backward(
    chunks: list[Tensor], parts: list[list[Tensor]], merged: list[Any], grads: list[Tensor]
) -> list[Any]:
    """Play every rank's backward."""
    return [
        ring._backward(
            LocalRing(r, chunks),  # pyright: ignore[reportArgumentType]
            grads[r],
            (*(part[r] for part in parts), *merged[r]),
            None,
        )
        for r in range(len(chunks))
    ]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return the error's norm over the wanted norm."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def split_figures(device: str, shape: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """Time one kernel over the whole sequence against the hops of rings of 2, 4 and 8."""
    dtype = torch.bfloat16
    q, k, v, grad = (torch.randn(shape, device=device, dtype=dtype) for _ in range(4))
    times: dict[str, list[float]] = {}
    errors: dict[int, float] = {}

    def clock(name: str, action: Callable[..., Any], *args: Any) -> Any:
        results: list[Any] = []
        times.setdefault(name, []).append(seconds(lambda: results.append(action(*args)), device))
        return results[0]

    for repeat in range(repeats + 1):
        out, lse = clock("forward", attend, q, k, v, None)
        dq, dk, _ = clock("backward", attend_backward, grad, q, k, v, None, out, lse)
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        clock("sdpa", functional.scaled_dot_product_attention, *heads_first)
        for size in RING_SIZES:
            parts = [list(t.chunk(size, dim=1)) for t in (q, k, v)]
            chunks = [torch.stack(pair) for pair in zip(parts[1], parts[2], strict=True)]
            merged = clock(f"forward{size}", split_forward, chunks, parts)
            pieces = list(grad.chunk(size, dim=1))
            shares = clock(f"backward{size}", split_backward, chunks, parts, merged, pieces)
            if not repeat:
                errors[size] = max(
                    relative_error(torch.cat([one[0] for one in merged], 1), out),
                    relative_error(torch.cat([one[0] for one in shares], 1), dq),
                    relative_error(
                        torch.stack([one[1] for one in shares]).float().sum(0),
                        torch.stack(dk.chunk(size, 1)).float().sum(0),
                    ),
                )
            del merged, shares
    return assemble(times, errors, choose_backend(q, k, False).name)


def assemble(
    times: dict[str, list[float]], errors: dict[int, float], backend: str
) -> dict[str, Any]:
    """Turn times into figures; the first repeat warmed up."""
    middle = {name: statistics.median(values[1:]) for name, values in times.items()}
    figures: dict[str, Any] = {"backend": {"value": backend}}
    for name in ("forward", "backward"):
        figures[f"whole_{name}_s"] = {"value": middle[name]}
        for size in RING_SIZES:
            ratio = statistics.median(
                a / b for a, b in zip(times[f"{name}{size}"][1:], times[name][1:], strict=True)
            )
            figures[f"ring{size}_{name}_over_whole"] = holds(
                ratio, f"<= {SPLIT_TARGET}", ratio <= SPLIT_TARGET
            )
    for size in RING_SIZES:
        figures[f"ring{size}_error"] = holds(errors[size], "<= 0.02", errors[size] <= 0.02)
    figures["sdpa_forward_over_whole"] = {"value": middle["sdpa"] / middle["forward"]}
    return figures


def main() -> None:
    """Measure and print one JSON object last."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=WHOLE_TOKENS, help="of the GPU's sequence")
    parser.add_argument("--quick", action="store_true", help="fewer repeats, shorter sequences")
    arguments = parser.parse_args()
    machine = {
        "device": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
    }
    figures = cpu_figures(arguments.quick)
    if arguments.device == "cuda" and torch.cuda.is_available():
        machine["device"] = torch.cuda.get_device_name()
        shape = (1, arguments.tokens, WHOLE_HEADS, WHOLE_WIDTH)
        figures |= split_figures("cuda", shape, 2 if arguments.quick else 5)
    else:
        why = "no NVIDIA GPU here" if arguments.device == "cuda" else "needs --device cuda"
        for size in RING_SIZES:
            for name in ("forward", "backward"):
                figures[f"ring{size}_{name}_over_whole"] = {"skipped": why}
    print(json.dumps({"benchmark": "ring", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()

"""Which attention kernels a run uses: found out once, at its start, and the same on all ranks.

Every kernel that takes the run's inputs has to reproduce the reference on a small input first:
output, log-sum-exp and, from a log-sum-exp over further keys, the gradients. Of those that do, the
fastest in forward and backward at the run's longest sequence is taken, with and without padding.
"""

import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hunyuan_train.memory.config import AttentionKernel
from hunyuan_train.parallel.attention_kernels import REFERENCE, Backend
from hunyuan_train.parallel.local_attention import (
    BACKENDS,
    attend_backward_with,
    attend_with,
    fix_backends,
)
from hunyuan_train.runtime.dist import gather_objects

log = logging.getLogger(__name__)

LARGEST_BYTES = 2**30
"""Of the tensors of a measurement; longer inputs are measured with fewer heads."""
LONGEST_S = 5.0
"""After this time a kernel is not run again."""
REPEATS = 5

# Largest error over the largest value of the reference. A kernel that is wrong is off by its size.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 5e-3, torch.float64: 1e-9}
_LSE_TOLERANCE = 5e-3
_CHECKED_ROWS = 300
_PADDED_ROWS = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionInputs:
    """The attention of one rank at the run's longest sequence."""

    device: torch.device
    dtype: torch.dtype
    """What blocks compute in."""
    heads: int
    """Of one rank: after tensor parallelism and Ulysses."""
    head_dim: int
    tokens: int
    """Of a hop: after Ulysses, before the next rank's keys arrive in a ring."""
    samples: int = 1
    masked_too: bool = True
    """Whether batches may have padding."""

    @property
    def cases(self) -> tuple[bool, ...]:
        """Whether there is a mask, for each kind of batch of the run."""
        return (False, True) if self.masked_too else (False,)


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """The kernels of a run by whether there is a mask, and how they were found."""

    kernels: Mapping[bool, str]
    milliseconds: Mapping[bool, Mapping[str, float]] = field(default_factory=dict)
    """Of forward and backward, on the slowest rank; empty where one kernel was left."""
    left_out: Mapping[bool, Mapping[str, str]] = field(default_factory=dict)
    """Kernels that cannot run here, or do not compute what the reference does, and why."""

    def __str__(self) -> str:
        """Return one line."""
        parts = []
        for masked, name in self.kernels.items():
            times = sorted(self.milliseconds.get(masked, {}).items(), key=lambda item: item[1])
            measured = ", ".join(f"{kernel} {ms:.3g} ms" for kernel, ms in times)
            parts.append(
                f"{'with' if masked else 'without'} padding {name}"
                + (f" ({measured})" if measured else "")
            )
        return "attention kernel " + "; ".join(parts)


def use_attention(choice: AttentionChoice | None) -> None:
    """Fix the kernels of this process; None returns to the table of ``local_attention``."""
    fix_backends({} if choice is None else choice.kernels)


@contextmanager
def attention_fixed(choice: AttentionChoice | None) -> Iterator[None]:
    """Fix the kernels inside a ``with`` block."""
    before = fix_backends({} if choice is None else choice.kernels)
    try:
        yield
    finally:
        fix_backends(before)


def choose_attention(kernel: AttentionKernel, inputs: AttentionInputs) -> AttentionChoice:
    """Return the kernels for a run; every rank has to call this and gets the same answer.

    Args:
        kernel: ``memory.attention``; ``auto`` measures what is there if it is more than one.
        inputs: what they will be given.

    Raises:
        ValueError: a kernel that was asked for cannot run here; on every rank.
    """
    auto = kernel is AttentionKernel.auto
    names = [n for n in BACKENDS if n != REFERENCE.name] if auto else [kernel.value]
    left_out, failed = _left_out_anywhere(names, inputs)
    if not auto:
        reason = next((left_out[case][kernel.value] for case in inputs.cases if left_out[case]), "")
        if reason:
            raise ValueError(_refusal(kernel, reason, inputs))
    for name, case, reason in failed:
        log.warning(
            "attention kernel %s is left out %s padding: %s",
            name,
            "with" if case else "without",
            reason,
        )
    kernels: dict[bool, str] = {}
    milliseconds: dict[bool, dict[str, float]] = {}
    for case in inputs.cases:
        rest = [name for name in names if name not in left_out[case]]
        if len(rest) > 1:
            times = milliseconds[case] = _slowest_rank(rest, inputs, case)
            rest = sorted((n for n in rest if times[n] < math.inf), key=times.__getitem__)
        kernels[case] = rest[0] if rest else REFERENCE.name
    if inputs.device.type == "cuda":
        torch.cuda.empty_cache()  # the run's first step finds the memory as if nothing had been
    choice = AttentionChoice(kernels, milliseconds, left_out)
    log.info("%s", choice)
    return choice


def _refusal(kernel: AttentionKernel, reason: str, inputs: AttentionInputs) -> str:
    """Return the sentence for a kernel that was asked for and cannot run."""
    found, _ = _left_out_here(list(BACKENDS), inputs)
    usable = [n for n in BACKENDS if all(n not in found[case] for case in inputs.cases)]
    return (
        f"memory.attention={kernel.value} cannot run here: {reason}; "
        f"choose auto, {', '.join(usable)}"
    )


def _left_out_anywhere(
    names: list[str], inputs: AttentionInputs
) -> tuple[dict[bool, dict[str, str]], list[tuple[str, bool, str]]]:
    """Return which kernels some rank cannot use and its reason, and which this one found wrong."""
    mine, failed = _left_out_here(names, inputs)
    everywhere: dict[bool, dict[str, str]] = {case: {} for case in inputs.cases}
    for found in gather_objects(mine):
        for case, reasons in found.items():
            everywhere[case] = reasons | everywhere[case]  # the first rank's reason
    return everywhere, failed


def _left_out_here(
    names: list[str], inputs: AttentionInputs
) -> tuple[dict[bool, dict[str, str]], list[tuple[str, bool, str]]]:
    left_out: dict[bool, dict[str, str]] = {case: {} for case in inputs.cases}
    failed: list[tuple[str, bool, str]] = []
    shape = (3, _CHECKED_ROWS, 2, inputs.head_dim)
    rows = _random(shape, inputs, 4)
    for name in names:
        for case in inputs.cases:
            reason = BACKENDS[name].refuses(rows[0], rows[1], case)
            if reason is None and (reason := _fault(BACKENDS[name], rows, case)) is not None:
                failed.append((name, case, reason))
            if reason is not None:
                left_out[case][name] = reason
    return left_out, failed


def _random(shape: tuple[int, ...], inputs: AttentionInputs, count: int) -> list[Tensor]:
    """Return random tensors, without touching the run's generators."""
    device = inputs.device
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(shape, generator=generator, device=device, dtype=inputs.dtype)
        for _ in range(count)
    ]


def _fault(backend: Backend, rows: list[Tensor], masked: bool) -> str | None:
    """Return how a kernel differs from the reference, None if it does not."""
    q, k, v, grad = rows
    mask = None
    if masked:
        mask = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
        mask[1, k.shape[1] // 3 :] = False  # a second half without keys
        mask[2] = False
    try:
        errors = errors_of(backend, q, k, v, grad, mask)
    except Exception as error:  # whatever a kernel fails with, the others are there
        return f"it fails with {_first_line(error)}"
    for name, error in errors.items():
        limit = _LSE_TOLERANCE if name == "log-sum-exp" else _TOLERANCE[q.dtype]
        if not error <= limit:
            return f"its {name} is off by {error:.2g} of the largest value"
    return None


def errors_of(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None
) -> dict[str, float]:
    """Return the largest errors of a kernel over the largest values of the float64 reference.

    The gradients are computed over two halves of the keys from the output and log-sum-exp over all.

    Returns:
        By "output", "log-sum-exp", "gradient of q", "gradient of k" and "gradient of v".
    """
    exact = q.double(), k.double(), v.double()
    wanted, wanted_lse = attend_with(REFERENCE, *exact, mask)
    wanted_grads = attend_backward_with(REFERENCE, grad.double(), *exact, mask, wanted, wanted_lse)
    out, lse = attend_with(backend, q, k, v, mask)
    half = k.shape[1] // 2
    parts = []
    for rows in (slice(0, half), slice(half, None)):
        keys, values = k[:, rows], v[:, rows]
        kept = None if mask is None else mask[:, rows].contiguous()
        given = wanted.to(q.dtype), wanted_lse.to(lse.dtype)
        parts.append(attend_backward_with(backend, grad, q, keys, values, kept, *given))
    found = {
        "output": (out, wanted),
        "log-sum-exp": (lse, wanted_lse),
        "gradient of q": (parts[0][0].double() + parts[1][0].double(), wanted_grads[0]),
        "gradient of k": (torch.cat([parts[0][1], parts[1][1]], 1), wanted_grads[1]),
        "gradient of v": (torch.cat([parts[0][2], parts[1][2]], 1), wanted_grads[2]),
    }
    return {name: _error(*pair) for name, pair in found.items()}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _error(found: Tensor, wanted: Tensor) -> float:
    """Return the largest error over the largest value, inf where they are not finite alike."""
    found = found.double()
    same = found == wanted  # both -inf
    difference = torch.where(same, 0.0, (found - wanted).abs()).nan_to_num(torch.inf)
    largest = wanted.masked_fill(wanted.isinf(), 0).abs().amax()
    return float(difference.amax() / largest.clamp(min=1e-12))


def _slowest_rank(names: list[str], inputs: AttentionInputs, masked: bool) -> dict[str, float]:
    """Return milliseconds by kernel, on the rank that takes longest; inf if it fails on one."""
    mine = measure(names, inputs, masked)
    everywhere = gather_objects(mine)
    return {name: max(times[name] for times in everywhere) for name in names}


def measure(names: list[str], inputs: AttentionInputs, masked: bool) -> dict[str, float]:
    """Return the median milliseconds of forward and backward of kernels, scaled to all heads."""
    shape = _measured_shape(inputs)
    q, k, v, grad = _random(shape, inputs, 4)
    mask = None
    if masked:
        mask = torch.ones(shape[:2], dtype=torch.bool, device=inputs.device)
        mask[-1, -min(_PADDED_ROWS, shape[1] // 2) :] = False
    found: dict[str, float] = {}
    for name in names:
        backend = BACKENDS[name]

        def step(backend: Backend = backend) -> None:
            out, lse = attend_with(backend, q, k, v, mask)
            attend_backward_with(backend, grad, q, k, v, mask, out, lse)

        try:
            ms = _median_ms(step, inputs.device)
        except RuntimeError as error:  # out of memory, say
            log.warning("attention kernel %s is left out: %s", name, _first_line(error))
            ms = math.inf
        found[name] = ms * inputs.heads * inputs.samples / (shape[0] * shape[2])
    return found


def _measured_shape(inputs: AttentionInputs) -> tuple[int, int, int, int]:
    """Return [B, S, A, E] of a measurement: all tokens, and as many heads as memory allows."""
    # q, k, v, output and their gradients, packed keys, and dq summed in float32.
    of_a_head = 14 * inputs.tokens * inputs.head_dim * inputs.dtype.itemsize
    fit = max(1, LARGEST_BYTES // of_a_head)
    heads = min(inputs.heads, fit)
    return min(inputs.samples, max(1, fit // heads)), inputs.tokens, heads, inputs.head_dim


def _median_ms(step: Callable[[], None], device: torch.device) -> float:
    """Return the median time of ``step``, run once before and then up to ``REPEATS`` times."""
    start = time.perf_counter()
    _milliseconds(step, device)
    times: list[float] = []
    while len(times) < REPEATS and not (times and time.perf_counter() - start > LONGEST_S):
        times.append(_milliseconds(step, device))
    return statistics.median(times)


def _milliseconds(step: Callable[[], None], device: torch.device) -> float:
    """Return the time of one ``step`` by the device's own clock."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)

"""Which kernel a run gets: measured, checked against the reference, the same on all ranks."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed import run_distributed
from torch import Tensor

from hunyuan_train.memory.config import AttentionKernel
from hunyuan_train.parallel import attention_choice as choosing
from hunyuan_train.parallel import flash_attn
from hunyuan_train.parallel import local_attention as local
from hunyuan_train.parallel.attention_choice import (
    AttentionChoice,
    AttentionInputs,
    attention_fixed,
    choose_attention,
    use_attention,
)
from hunyuan_train.parallel.attention_kernels import CPU, Backend
from hunyuan_train.parallel.local_attention import attend, attend_backward, choose_backend

INPUTS = AttentionInputs(
    device=torch.device("cpu"), dtype=torch.float32, heads=2, head_dim=16, tokens=24
)


def kernel(name: str, **changes: Any) -> Backend:
    return replace(CPU, name=name, **changes)


def offer(monkeypatch: pytest.MonkeyPatch, *backends: Backend) -> None:
    """Let these be all kernels there are, beside the reference."""
    found = {b.name: b for b in backends} | {"reference": local.BACKENDS["reference"]}
    monkeypatch.setattr(local, "BACKENDS", found)
    monkeypatch.setattr(choosing, "BACKENDS", found)


def slowly(run: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def slow(*args: Any) -> Any:
        time.sleep(seconds)
        return run(*args)

    return slow


def masks_only(slow: Callable[..., Any]) -> Callable[..., Any]:
    """Return the forward that is slow where keys are masked."""
    return lambda q, k, v, layout: (CPU.forward if layout is None else slow)(q, k, v, layout)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let time pass in what the kernels say they take, not on the wall of a busy machine."""
    passed = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: passed.append(passed.pop() + seconds))
    monkeypatch.setattr(choosing.time, "perf_counter", lambda: passed[0])
    return passed


def test_the_faster_kernel_wins_in_each_case(
    monkeypatch: pytest.MonkeyPatch, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    offer(
        monkeypatch,
        kernel("steady", forward=slowly(CPU.forward, 0.02)),
        kernel("dense", forward=masks_only(slowly(CPU.forward, 0.05))),
    )
    with caplog.at_level(logging.INFO):
        choice = choose_attention(AttentionKernel.auto, INPUTS)
    assert choice.kernels == {False: "dense", True: "steady"}
    assert choice.milliseconds[True] == pytest.approx({"steady": 20.0, "dense": 50.0})
    assert choice.milliseconds[False] == pytest.approx({"steady": 20.0, "dense": 0.0})
    assert str(choice) in caplog.text
    assert "with padding steady (steady 20 ms, dense 50 ms)" in str(choice)


def test_the_backward_counts(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    offer(
        monkeypatch,
        kernel("a", backward=slowly(CPU.backward, 0.03)),
        kernel("b", forward=slowly(CPU.forward, 0.02)),
    )
    assert choose_attention(AttentionKernel.auto, INPUTS).kernels[False] == "b"


def test_a_slow_kernel_is_not_run_again_and_again(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    offer(monkeypatch, kernel("slow", forward=slowly(CPU.forward, 4.0)), kernel("other"))
    choose_attention(AttentionKernel.auto, replace(INPUTS, masked_too=False))
    assert clock[0] <= 4.0 * 3 + 0.1  # the check, the warm-up and one run


def test_one_kernel_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choosing, "measure", lambda *args: pytest.fail("measured"))
    choice = choose_attention(AttentionKernel.auto, INPUTS)
    assert choice.kernels == {False: "cpu", True: "cpu"}
    assert choice.left_out[False]["flash"] == "it needs a CUDA device, not cpu"


def no_scale(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
    return CPU.forward(2 * q, k, v, layout)


def log2(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
    out, lse = CPU.forward(q, k, v, layout)
    return out, lse / 0.6931


def own_lse(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, layout: Any, *given: Tensor) -> Any:
    """A backward that ignores the output and log-sum-exp over further keys."""
    out, lse = CPU.forward(q, k, v, layout)
    return CPU.backward(grad, q, k, v, layout, out, lse)


def sees_all(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
    return CPU.forward(q, k, v, None)


def nothing_behind(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Any:
    dq, dk, dv = CPU.backward(grad, q, k, v, *rest)
    return dq, dk, torch.full_like(dv, torch.nan)


def fails(*args: Any) -> Any:
    raise RuntimeError("no kernel image\nfor this device")


@pytest.mark.parametrize(
    ("broken", "case", "words"),
    [
        ({"forward": no_scale}, False, "its output is off by"),
        ({"forward": log2}, False, "its log-sum-exp is off by"),
        ({"backward": own_lse}, False, "its gradient of q is off by"),
        ({"backward": nothing_behind}, False, "its gradient of v is off by inf"),
        ({"forward": sees_all}, True, "its output is off by"),
        ({"forward": fails}, False, "it fails with RuntimeError: no kernel image"),
    ],
)
def test_a_wrong_kernel_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: dict[str, Any],
    case: bool,
    words: str,
) -> None:
    offer(monkeypatch, kernel("broken", **broken), kernel("good"))
    choice = choose_attention(AttentionKernel.auto, INPUTS)
    assert choice.kernels[case] == "good"
    assert choice.left_out[case]["broken"].startswith(words)
    place = "with padding" if case else "without padding"
    assert f"kernel broken is left out {place}: {words}" in caplog.text


def test_a_kernel_that_is_wrong_with_padding_alone_may_win_without(
    monkeypatch: pytest.MonkeyPatch, clock: list[float]
) -> None:
    offer(
        monkeypatch,
        kernel("dense", forward=sees_all),
        kernel("good", forward=slowly(CPU.forward, 0.01)),
    )
    assert choose_attention(AttentionKernel.auto, INPUTS).kernels == {False: "dense", True: "good"}


def test_the_reference_is_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, kernel("broken", forward=fails))
    choice = choose_attention(AttentionKernel.auto, INPUTS)
    assert choice.kernels == {False: "reference", True: "reference"}


def test_running_out_of_memory_leaves_a_kernel_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(q: Tensor, k: Tensor, v: Tensor, layout: Any) -> tuple[Tensor, Tensor]:
        if q.shape[1] == INPUTS.tokens:
            raise RuntimeError("out of memory")
        return CPU.forward(q, k, v, layout)

    offer(monkeypatch, kernel("hungry", forward=hungry), kernel("good"))
    assert choose_attention(AttentionKernel.auto, INPUTS).kernels == {False: "good", True: "good"}


def test_long_inputs_are_measured_with_fewer_heads() -> None:
    long = AttentionInputs(
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        heads=24,
        head_dim=128,
        tokens=119_056,
        samples=2,
    )
    assert choosing._measured_shape(long) == (1, 119_056, 2, 128)
    short = replace(long, tokens=512)
    assert choosing._measured_shape(short) == (2, 512, 24, 128)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("flash3", "the package flash-attn-3 is not installed"),
        ("cudnn", "it needs a CUDA device, not cpu"),
    ],
)
def test_a_kernel_that_cannot_run_ends_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.setattr(
        flash_attn, "_load", lambda name: f"the package flash-attn-{name[-1]} is not installed"
    )
    with pytest.raises(ValueError) as error:
        choose_attention(AttentionKernel(name), INPUTS)
    assert str(error.value) == (
        f"memory.attention={name} cannot run here: {reason}; choose auto, cpu, reference"
    )


def test_a_kernel_that_was_asked_for_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, kernel("flash4", forward=sees_all), kernel("cpu"))
    with pytest.raises(
        ValueError, match=r"memory\.attention=flash4 cannot run here: its output is"
    ):
        choose_attention(AttentionKernel.flash4, INPUTS)
    dense = choose_attention(AttentionKernel.flash4, replace(INPUTS, masked_too=False))
    assert dense.kernels == {False: "flash4"}


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_a_kernel_that_was_asked_for_is_taken(name: str) -> None:
    choice = choose_attention(AttentionKernel(name), INPUTS)
    assert choice.kernels == {False: name, True: name}


def test_every_kernel_of_the_config_exists() -> None:
    assert {"auto", *local.BACKENDS} == {kernel.value for kernel in AttentionKernel}


def test_choosing_does_not_move_the_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    choosing.measure(["cpu"], INPUTS, True)
    choose_attention(AttentionKernel.auto, INPUTS)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_fixed_kernel_runs_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def note(run: Callable[..., Any], word: str) -> Callable[..., Any]:
        return lambda *args: (ran.append(word), run(*args))[1]

    chosen = kernel(
        "chosen", forward=note(CPU.forward, "forward"), backward=note(CPU.backward, "backward")
    )
    offer(monkeypatch, chosen, kernel("cpu"))
    q = torch.randn(1, 5, 2, 16)
    use_attention(AttentionChoice({False: "chosen"}))
    try:
        out, lse = attend(q, q, q, None)
        attend_backward(q, q, q, q, None, out, lse)
        assert ran == ["forward", "backward"]
        attend(q, q, q, torch.ones(1, 5, dtype=torch.bool))  # that case is not fixed
        assert ran == ["forward", "backward"]
    finally:
        use_attention(None)
    attend(q, q, q, None)
    assert ran == ["forward", "backward"]


def test_inputs_a_fixed_kernel_does_not_take_go_elsewhere_with_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    picky = kernel("picky", refuses=lambda q, k, masked: "too short" if k.shape[1] < 4 else None)
    offer(monkeypatch, picky)
    q = torch.randn(1, 5, 2, 16)
    with attention_fixed(AttentionChoice({False: "picky"})):
        assert choose_backend(q, q, False).name == "picky"
        for _ in range(3):
            assert choose_backend(q, q[:, :3], False).name == "cpu"
    assert caplog.text.count("kernel picky is replaced by cpu: too short") == 1
    assert choose_backend(q, q, False).name == "cpu"


def _choose_on(rank: int, world: int, slow_rank: int) -> tuple[AttentionChoice, str]:
    """Two kernels of which one is slow on one rank, and one that fails on another rank."""
    monkeypatch = pytest.MonkeyPatch()
    elsewhere = kernel("cudnn", forward=fails if rank == 1 else CPU.forward)
    offer(monkeypatch, kernel("first"), kernel("second"), elsewhere)
    seconds = {"first": 9.0 if rank == slow_rank else 1.0, "second": 2.0 + rank, "cudnn": 0.1}
    monkeypatch.setattr(choosing, "measure", lambda names, *_: {n: seconds[n] for n in names})
    choice = choose_attention(AttentionKernel.auto, INPUTS)
    try:
        choose_attention(AttentionKernel.cudnn, INPUTS)
    except ValueError as error:
        return choice, str(error)
    return choice, ""


@pytest.mark.dist
@pytest.mark.parametrize(("slow_rank", "winner"), [(0, "second"), (1, "second"), (5, "first")])
def test_all_ranks_choose_the_kernel_that_is_fast_and_there_on_all(
    slow_rank: int, winner: str
) -> None:
    found = run_distributed(_choose_on, 2, slow_rank)
    for choice, error in found:
        assert choice.kernels == {False: winner, True: winner}
        assert choice == found[0][0]
        assert error.startswith("memory.attention=cudnn cannot run here: it fails with")

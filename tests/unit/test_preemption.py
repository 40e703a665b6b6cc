"""Preemption signals become a flag that all ranks agree on."""

import os
import signal
import threading

import pytest
import torch
from distributed import run_distributed

from hunyuan_train.resilience.config import ResilienceConfig
from hunyuan_train.resilience.crashes import EXIT_PREEMPTED
from hunyuan_train.resilience.preemption import Preemption


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_sets_the_flag_and_it_stays(name: str):
    with Preemption(ResilienceConfig()) as preemption:
        assert preemption.local_flag() == 0.0
        assert not preemption.requested()
        assert preemption.reason == ""
        os.kill(os.getpid(), signal.Signals[name])
        assert preemption.local_flag() == 1.0
        assert preemption.requested()
        assert preemption.requested()
        assert preemption.reason == name


def test_the_handlers_before_are_restored():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(ResilienceConfig(preemption_signals=["SIGTERM"])):
        assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_reduced_flag_is_the_answer_for_a_rank_that_got_no_signal():
    preemption = Preemption(ResilienceConfig())
    assert not preemption.agree(torch.zeros(()))
    assert preemption.agree(torch.tensor(2.0))
    assert preemption.agree(0.0)
    assert preemption.reason == "another rank"


def test_outside_the_main_thread_nothing_is_installed(caplog: pytest.LogCaptureFixture):
    before = signal.getsignal(signal.SIGTERM)

    def enter() -> None:
        with Preemption(ResilienceConfig()):
            pass

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "not in the main thread" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("name", ["SIGKILL", "SIGNOTHING"])
def test_a_signal_that_cannot_be_caught_is_refused(name: str):
    with pytest.raises(ValueError, match=f"preemption_signals has '{name}', no signal that can be"):
        ResilienceConfig(preemption_signals=[name])


def test_the_exit_code_says_try_again():
    assert EXIT_PREEMPTED == os.EX_TEMPFAIL


def _one_rank_is_signalled(rank: int, world: int) -> tuple[list[bool], str]:
    with Preemption(ResilienceConfig()) as preemption:
        answers = []
        for step in range(4):
            if rank == 1 and step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
            answers.append(preemption.requested())
        return answers, preemption.reason


@pytest.mark.dist
def test_all_ranks_stop_at_the_same_step():
    results = run_distributed(_one_rank_is_signalled, 2)
    assert results == [
        ([False, False, True, True], "another rank"),
        ([False, False, True, True], "SIGUSR1"),
    ]

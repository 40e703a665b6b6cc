"""Slow work beside training: done in order, dropped when there is too much, never waited for."""

import logging
import threading
import time

import pytest

from hunyuan_train.observability.background import Background


def test_jobs_run_in_order_and_close_waits_for_them() -> None:
    done: list[int] = []
    work = Background(8)
    for number in range(5):
        assert work.submit("samples", lambda number=number: done.append(number))
    work.close()
    assert done == [0, 1, 2, 3, 4]
    assert work.dropped == 0


def test_a_full_queue_drops_loudly_and_never_waits(caplog: pytest.LogCaptureFixture) -> None:
    work, held, begun = Background(2), threading.Event(), threading.Event()
    done: list[str] = []

    def slow() -> None:
        begun.set()
        held.wait()
        done.append("slow")

    assert work.submit("samples", slow)
    assert begun.wait(10)
    started = time.perf_counter()
    kept = [work.submit("samples of step 7", lambda: done.append("quick")) for _ in range(5)]
    assert time.perf_counter() - started < 1.0
    assert kept == [True, True, False, False, False]
    assert work.dropped == 3
    assert "SAMPLES OF STEP 7 DROPPED" in caplog.text
    held.set()
    work.close()
    assert done == ["slow", "quick", "quick"]


def test_a_job_that_fails_is_told_and_the_next_one_runs(caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    work = Background(4)
    work.submit("samples of step 3", lambda: [][0])
    work.submit("samples", lambda: done.append(1))
    work.close()
    assert done == [1]
    assert work.failed == 1
    assert "samples of step 3 were not written: IndexError" in caplog.text


def test_closing_gives_up_on_what_never_ends(caplog: pytest.LogCaptureFixture) -> None:
    work, held = Background(1), threading.Event()
    work.submit("samples", held.wait)
    with caplog.at_level(logging.WARNING):
        started = time.perf_counter()
        work.close(wait_s=0.2)
        assert time.perf_counter() - started < 5.0
    assert "given up" in caplog.text
    held.set()

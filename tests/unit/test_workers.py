import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from hunyuan_train.data.child_process import Child
from hunyuan_train.data.quarantine import MediaError, Reason, SampleError
from hunyuan_train.data.workers import ProcessWorkers, ThreadWorkers

ROOT = Path(__file__).resolve().parents[2]


def work(kind: str, folder: str = "", value: int = 0):
    """What the workers of these tests do; ``once`` misbehaves only when it is first called."""
    first = Path(folder) / f"{value}.called"
    if kind.startswith("once"):
        if first.exists():
            return value
        first.touch()
    if kind.endswith("sleep"):
        time.sleep(60)
    if kind.endswith("exit"):
        os._exit(3)
    if kind.endswith("segfault"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "raise":
        raise KeyError("nothing there")
    if kind == "media":
        raise MediaError(Reason.damaged, "corrupt frames: 2")
    if kind == "lambda":
        return lambda: None
    if kind == "array":
        return {"pixels": np.full((value, 8, 8, 3), value, np.uint8), "pid": os.getpid()}
    return value * value


def hang(event: threading.Event):
    event.wait(60)


def data_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("data-")]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A killed child of the fork server stays a zombie until that reaps it.
    return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"


@pytest.fixture(params=[ThreadWorkers, ProcessWorkers])
def pool(request):
    workers = request.param(work, 2, 20.0)
    yield workers
    workers.close()
    assert data_threads() == []
    assert multiprocessing.active_children() == []


@pytest.fixture
def processes():
    workers = ProcessWorkers(work, 2, 1.0)
    yield workers
    workers.close()
    assert data_threads() == []
    assert multiprocessing.active_children() == []


def test_futures_hold_the_results_of_their_own_jobs(pool):
    futures = [pool.submit(f"s{value}", "square", "", value) for value in range(20)]
    assert [future.result(30) for future in futures] == [value * value for value in range(20)]


def test_what_a_job_raises_makes_its_sample_bad_and_nothing_else(pool):
    bad, media, good = (pool.submit(name, name) for name in ("raise", "media", "square"))
    with pytest.raises(SampleError, match="nothing there") as raised:
        bad.result(30)
    assert (raised.value.sample_id, raised.value.reason) == ("raise", Reason.unreadable)
    with pytest.raises(SampleError) as raised:
        media.result(30)
    assert (raised.value.reason, raised.value.detail) == (Reason.damaged, "corrupt frames: 2")
    assert good.result(30) == 0


def test_arrays_come_back_whole_and_can_be_written_to(processes):
    futures = [processes.submit("s", "array", "", value) for value in range(1, 9)]
    for value, future in enumerate(futures, start=1):
        pixels = future.result(30)["pixels"]
        assert pixels.shape == (value, 8, 8, 3)
        assert (pixels == value).all()
        pixels += 1  # torch.from_numpy warns about memory that is read-only


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("exit", "ended with exit code 3"),
        ("segfault", "was killed by SIGSEGV"),
        ("sleep", "took more than 1 s"),
    ],
)
def test_lost_process_is_named_and_its_job_is_tried_once_more(
    processes, kind, said, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        again = processes.submit("clip7", f"once-{kind}", str(tmp_path), 7)
        assert again.result(30) == 7
    (record,) = caplog.records
    assert f"{said} on sample clip7" in record.message
    assert "tried once more" in record.message
    assert record.message.startswith("data worker ")
    pid = int(record.message.split("(pid ")[1].split(")")[0])
    assert not alive(pid)
    caplog.clear()
    with pytest.raises(SampleError, match=f"{said}, at the second attempt too") as raised:
        processes.submit("clip8", kind).result(30)
    assert raised.value.reason == Reason.unreadable
    assert len(caplog.records) == 2
    assert processes.submit("clip9", "square", "", 3).result(30) == 9


def test_process_that_dies_between_two_jobs_costs_no_attempt(processes, caplog):
    pids = {processes.submit("s", "array", "", 1).result(30)["pid"] for _ in range(8)}
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    time.sleep(0.3)
    futures = [processes.submit("s", "square", "", value) for value in range(4)]
    assert [future.result(30) for future in futures] == [0, 1, 4, 9]
    assert all("was killed by SIGKILL while it was idle" in r.message for r in caplog.records)


def test_process_does_not_mind_what_a_scheduler_sends_to_the_whole_job(processes, caplog):
    pids = {processes.submit("s", "array", "", 1).result(30)["pid"] for _ in range(8)}
    for pid in pids:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, number)
    futures = [processes.submit("s", "square", "", value) for value in range(8)]
    assert [future.result(30) for future in futures] == [value * value for value in range(8)]
    assert all(alive(pid) for pid in pids)
    assert not caplog.records


def test_result_that_cannot_be_sent_is_a_bad_sample(processes):
    with pytest.raises(SampleError, match="its result cannot be sent"):
        processes.submit("s", "lambda").result(30)
    assert processes.submit("s", "square", "", 2).result(30) == 4


def test_process_that_cannot_start_is_an_error_of_the_run(monkeypatch):
    def refuse(self, closed):
        raise RuntimeError("a data worker process (pid 1) does not start: no")

    monkeypatch.setattr(Child, "wait_until_ready", refuse)
    workers = ProcessWorkers(work, 1, 5.0)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not start"):
            workers.submit("s", "square").result(30)
    workers.close()


def test_thread_that_hangs_is_replaced_and_its_late_result_ignored(caplog):
    event = threading.Event()
    workers = ThreadWorkers(hang, 1, 1.0)
    with caplog.at_level(logging.WARNING):
        future = workers.submit("far/clip.mp4", event)
        with pytest.raises(SampleError, match="took more than 1 s, at the second attempt too"):
            future.result(30)
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert all(
        "on sample far/clip.mp4" in text and f"pid {os.getpid()}" in text for text in messages
    )
    event.set()
    assert workers.submit("near", event).result(30) is None
    workers.close()
    # The thread that hung was let go, and ends in its own time.
    until = time.monotonic() + 20
    while data_threads() and time.monotonic() < until:
        time.sleep(0.01)
    assert data_threads() == []


def test_close_cancels_what_waits_and_kills_what_runs():
    workers = ProcessWorkers(work, 1, 60.0)
    pid = workers.submit("s", "array", "", 1).result(30)["pid"]
    running, waiting = workers.submit("a", "sleep"), workers.submit("b", "square")
    time.sleep(0.2)
    started = time.monotonic()
    workers.close()
    assert time.monotonic() - started < 5
    for future in (running, waiting, workers.submit("c", "square")):
        with pytest.raises(CancelledError):
            future.result(0)
    assert not alive(pid)


PROGRAM = """
    import sys, threading
    sys.path.insert(0, {root!r})
    from hunyuan_train.data.workers import ProcessWorkers
    from tests.unit.test_workers import work
    if __name__ == "__main__":
        workers = ProcessWorkers(work, 2, 60.0)
        pids = {{workers.submit("s", "array", "", 1).result(60)["pid"] for _ in range(10)}}
        print(*pids, flush=True)
        workers.submit("s", "sleep")
        workers.submit("s", "sleep")
        import os, signal, time
        time.sleep(0.3)
        {end}
"""


@pytest.mark.parametrize("end", ["raise KeyError('bug')", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_no_process_outlives_a_program_that_ends_in_the_middle(end, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM).format(root=str(ROOT), end=end))
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == (1 if "raise" in end else -signal.SIGKILL)
    pids = [int(word) for word in done.stdout.split()]
    assert pids, done.stderr
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)


def test_decoding_processes_do_without_torch():
    code = "import sys, hunyuan_train.data.child_process, hunyuan_train.data.dataset; "
    code += "sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

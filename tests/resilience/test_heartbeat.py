"""The record of a rank: cheap to write, whole to read, from outside and after a crash."""

import contextlib
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest

from hunyuan_train.resilience.heartbeat import Heartbeat, beat_path, process_start, read_beat
from hunyuan_train.resilience.stacks import parse_dump, summary


def mark_forever(run_dir: str) -> None:
    """Mark phases whose bucket and step belong together."""
    heart = Heartbeat(run_dir, 0, 0, stacks=False)
    for step in range(10**9):
        heart.beat(step, float(step), busy_s=1.0)
        heart.phase("forward", f"{step % 1000}")


def test_a_record_tells_what_was_marked(tmp_path: Path) -> None:
    assert read_beat(beat_path(tmp_path, 3, 5)) is None
    heart = Heartbeat(tmp_path, 3, 5, node=2, stacks=False)
    first = read_beat(beat_path(tmp_path, 3, 5))
    assert first is not None
    assert (first.rank, first.node, first.pid, first.phase) == (5, 2, os.getpid(), "start")
    assert first.started == process_start(os.getpid())[1]
    heart.resume(6)
    resumed = read_beat(beat_path(tmp_path, 3, 5))
    assert resumed is not None
    assert (resumed.step, resumed.phase, resumed.cost) == (6, "start", 0.0)
    heart.beat(7, 1.5, busy_s=0.5, cost=2.0)
    heart.phase("data")
    heart.phase("forward", "17x256x256")
    heart.phase("backward", "17x256x256")
    heart.phase("forward", "33x256x256")
    beat = read_beat(beat_path(tmp_path, 3, 5))
    assert beat is not None
    assert (beat.step, beat.micro_step, beat.phase, beat.bucket) == (7, 2, "forward", "33x256x256")
    assert (beat.step_s, beat.busy, beat.cost, beat.marks) == (1.5, 0.5, 2.0, first.marks + 6)
    assert first.time <= beat.time <= time.monotonic()


def test_a_block_returns_to_the_phase_before_unless_it_fails(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 0, 0, stacks=False)
    path = beat_path(tmp_path, 0, 0)

    def phase() -> tuple[str, tuple[int, int, int, bool]]:
        beat = read_beat(path)
        assert beat is not None
        return beat.phase, beat.progress

    heart.beat(4, 1.0)
    with heart.phase("save"):
        assert phase() == ("save", (4, 0, 2, False))
        with heart.phase("collective"):
            assert phase() == ("collective", (4, 0, 2, True))
    assert phase() == ("loop", (4, 0, 2, False)), "whoever saved is not behind those that still do"
    with pytest.raises(OSError), heart.phase("evaluate"):
        raise OSError
    assert phase()[0] == "evaluate"
    with pytest.raises(OSError), heart:
        raise OSError
    assert phase()[0] == "failed"
    with heart:
        heart.phase("forward")
    assert phase()[0] == "done"


def test_readings_are_whole_while_the_rank_writes_and_after_it_is_stopped(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    process: Any = context.Process(target=mark_forever, args=(str(tmp_path),), daemon=True)
    process.start()
    try:
        path, seen = beat_path(tmp_path, 0, 0), 0
        end = time.monotonic() + 60
        while seen < 5000 and time.monotonic() < end:
            if seen % 50 == 49:  # stops it anywhere, also inside a write
                os.kill(process.pid, signal.SIGSTOP)
            beat = read_beat(path)
            if beat is not None and beat.step:
                seen += 1
                assert beat.step_s == beat.step == beat.busy - 1
                assert beat.bucket == ("" if beat.phase == "loop" else f"{beat.step % 1000}")
                assert beat.micro_step == (beat.phase == "forward")
            os.kill(process.pid, signal.SIGCONT)
        assert seen == 5000
    finally:
        process.kill()
        process.join(10)


def test_a_write_that_was_cut_off_leaves_the_reading_before_it(tmp_path: Path) -> None:
    heart, path = Heartbeat(tmp_path, 0, 0, stacks=False), beat_path(tmp_path, 0, 0)
    for name in ("data", "forward", "backward", "update"):
        before = path.read_bytes()
        heart.phase(name)
        after = path.read_bytes()
        changed = [n for n in range(len(after)) if before[n] != after[n]]
        for cut in changed[1:]:
            path.write_bytes(after[:cut] + before[cut:])
            beat = read_beat(path)
            assert beat is not None
            assert beat.phase != name
        path.write_bytes(after)
        whole = read_beat(path)
        assert whole is not None
        assert whole.phase == name


def test_a_write_during_a_reading_is_noticed(tmp_path: Path) -> None:
    heart, path = Heartbeat(tmp_path, 0, 0, stacks=False), beat_path(tmp_path, 0, 0)
    heart.beat(1, 1.0)
    before = path.read_bytes()
    heart.beat(2, 2.0)
    heart.beat(3, 3.0)
    after = path.read_bytes()
    # The numbers of a slot from after the writes, what is between them from before.
    mixed = bytearray(before)
    for start in (128, 256):
        slot = after[start : start + 128].rstrip(b"\0")
        last = start + len(slot)
        mixed[start : start + 8] = after[start : start + 8]
        mixed[last - 8 : last + 8] = after[last - 8 : last + 8]

    class Torn:
        def __init__(self) -> None:
            self.readings = [bytes(mixed), after, after]

        def open(self, *_: object, **__: object) -> Any:
            return contextlib.nullcontext(self)

        def read(self, _: int) -> bytes:
            return self.readings.pop(0)

        def seek(self, _: int) -> None: ...

    beat = read_beat(cast(Path, Torn()))
    assert beat is not None
    assert (beat.step, beat.step_s) == (3, 3.0)


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rank-0.beat"
    path.write_bytes(b"x" * 10)
    with pytest.raises(ValueError, match="is no heartbeat of this version; remove the folder"):
        read_beat(path)


def test_marks_cost_microseconds(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 0, 0, stacks=False)
    best = float("inf")
    for _ in range(200):  # short stretches: some of them run without interruption
        begun = time.perf_counter()
        for _ in range(50):
            heart.phase("forward", "17x256x256")
            heart.phase("backward", "17x256x256")
        best = min(best, (time.perf_counter() - begun) / 100)
    print(f"{best * 1e6:.2f} us per mark")
    assert best < 10e-6  # 1.6 us on an idle machine


def test_own_seconds_are_work_and_data_but_not_waiting(tmp_path: Path) -> None:
    heart = Heartbeat(tmp_path, 0, 0, stacks=False)
    heart.beat(1, 1.0)
    before = read_beat(beat_path(tmp_path, 0, 0))
    heart.phase("data")
    time.sleep(0.1)
    heart.phase("forward")
    time.sleep(0.2)  # as a rank that waits in gloo
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    heart.beat(2, 1.0)
    after = read_beat(beat_path(tmp_path, 0, 0))
    assert before is not None
    assert after is not None
    assert 0.15 <= after.busy - before.busy < 0.3


def test_monitors_start_without_torch() -> None:
    names = "watchdog, heartbeat, stacks, events, stragglers"
    code = f"import sys; from hunyuan_train.resilience import {names}\n"
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


DUMP = """Thread 0x00007f0000000001 (most recent call first):
  File "/x/site-packages/torch/distributed/distributed_c10d.py", line 9 in all_reduce
  File "/x/hooks.py", line 3 in hook

Current thread 0x00007f0000000002 (most recent call first):
  File "{top}", line 12 in {function}
  File "/x/train.py", line 4 in step
"""


@pytest.mark.parametrize(
    ("top", "function", "waits"),
    [
        ("/x/site-packages/torch/distributed/distributed_c10d.py", "barrier", "collective"),
        ("/x/site-packages/torch/cuda/__init__.py", "synchronize", "device"),
        ("/x/site-packages/torch/nn/functional.py", "linear", "code"),
        ("/x/model.py", "forward", "code"),
        # The engine's threads run the hooks of backward: one of them waits in a collective.
        ("/x/site-packages/torch/autograd/graph.py", "_engine_run_backward", "collective"),
    ],
)
def test_stacks_tell_what_a_rank_waits_for(top: str, function: str, waits: str) -> None:
    stack = parse_dump(DUMP.format(top=top, function=function), 0x7F0000000002)
    assert stack.waits == waits
    assert str(stack.frames[0]) == f"{top}:12 in {function}"
    assert parse_dump("nonsense").waits == ""


def test_summaries_show_equal_stacks_once_and_odd_ones_first() -> None:
    common = parse_dump(DUMP.format(top="/x/a.py", function="a"))
    odd = parse_dump(DUMP.format(top="/x/b.py", function="b"))
    text = summary({0: common, 1: common, 2: odd, 3: common, 4: common, 5: common}, depth=1)
    assert text == (
        "rank 2:\n  /x/b.py:12 in b\n  and 1 outer calls\n"
        "ranks 0 1 3-5:\n  /x/a.py:12 in a\n  and 1 outer calls"
    ).replace("3-5", "3 4 5")

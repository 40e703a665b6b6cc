"""The file of events: whole lines from many writers, readable after a crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hunyuan_train.resilience.events import FILE_NAME, EventKind, Events, read_events

WRITER = """
import sys
from hunyuan_train.resilience.events import Events
events = Events(sys.argv[1], rank=int(sys.argv[2]))
for step in range(200):
    events.emit("save", step=step, detail="x" * 300)
assert "torch" not in sys.modules
"""


def test_events_come_back_in_order_with_their_place(tmp_path: Path) -> None:
    Events(tmp_path, attempt=2, rank=1).emit(EventKind.save, step=7, stall_s=0.25)
    Events(tmp_path, attempt=3).emit("detected", rank=4, fault="hung")
    first, second = read_events(tmp_path)
    assert first["time"] <= second["time"]
    assert (first["kind"], first["attempt"], first["rank"], first["node"]) == ("save", 2, 1, 0)
    assert (first["step"], first["stall_s"]) == (7, 0.25)
    assert (second["attempt"], second["rank"], second["fault"]) == (3, 4, "hung")
    assert read_events(tmp_path / "nothing") == []


def test_attempt_and_node_come_from_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    Events(tmp_path).emit("stop")
    monkeypatch.setenv("HUNYUAN_ATTEMPT", "5")
    monkeypatch.setenv("GROUP_RANK", "1")
    Events(tmp_path).emit("stop")
    assert [(e["attempt"], e["node"]) for e in read_events(tmp_path)] == [(3, 0), (5, 1)]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_cut_line_costs_itself_only(tmp_path: Path, cut: int) -> None:
    path = tmp_path / FILE_NAME
    events = Events(tmp_path, attempt=0)
    events.emit("save", step=1)
    whole = path.stat().st_size
    events.emit("save", step=2)
    os.truncate(path, whole + cut)
    assert [event["step"] for event in read_events(tmp_path)] == [1]
    events.emit("save", step=3)
    assert [event["step"] for event in read_events(tmp_path)] == [1, 3]


def test_writers_in_several_processes_do_not_mix_lines(tmp_path: Path) -> None:
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(rank)])
        for rank in range(3)
    ]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    events = read_events(tmp_path)
    for rank in range(3):
        assert [e["step"] for e in events if e["rank"] == rank] == list(range(200))
    lines = (tmp_path / FILE_NAME).read_text().splitlines()
    assert len(events) == len([line for line in lines if line]) == 600


def test_a_disk_that_refuses_costs_the_event_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE_NAME).mkdir()
    Events(tmp_path, attempt=0).emit("save", step=1)
    assert "event save is lost" in caplog.text

"""Who works on what, on one machine and on several."""

import errno
import fcntl
import subprocess
import sys
import time

import pytest

from hunyuan_train.data.claims import Claims
from hunyuan_train.runtime.env import read_array_task


def test_a_name_is_held_by_one_and_its_notes_are_kept(tmp_path):
    one, two = Claims(tmp_path), Claims(tmp_path)
    claim = one.take("unit")
    assert claim is not None
    assert two.take("unit") is None
    other = two.take("other")
    assert other is not None
    one.release(claim, "part-1")
    again = two.take("unit")
    assert again is not None
    assert again.notes == ["part-1"]
    two.close()
    assert one.take("unit") is not None
    one.close()


def test_a_killed_process_of_this_machine_holds_nothing(tmp_path):
    script = (
        "import os, sys; from pathlib import Path; from hunyuan_train.data.claims import Claims\n"
        "claim = Claims(Path(sys.argv[1])).take('unit'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    assert Claims(tmp_path).take("unit") is not None


def test_another_machine_is_respected_as_long_as_it_lives(tmp_path, monkeypatch):
    """As on a file system whose locks each machine has for itself."""
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    far, near = Claims(tmp_path, "far", lease_s=0.4), Claims(tmp_path, "near", lease_s=0.4)
    assert far.take("unit") is not None
    for _ in range(10):
        assert near.take("unit") is None
        time.sleep(0.08)
    far._closed.set()  # it is gone without a word
    time.sleep(0.15)
    assert near.take("unit") is None
    time.sleep(0.5)
    assert near.take("unit") is not None
    near.close()


def test_half_a_record_is_no_claim(tmp_path):
    (tmp_path / "unit.lock").write_text('{"owner": "fa')
    assert Claims(tmp_path).take("unit") is not None


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(ValueError, match=r"file system without file locks .*-o flock"):
        Claims(tmp_path).take("unit")


@pytest.mark.parametrize(
    ("count", "task", "lowest", "highest", "place"),
    [(4, 0, 0, 3, 0), (4, 3, 0, 3, 3), (4, 5, 3, 6, 2), (3, 8, 0, 8, 2), (1, 7, 7, 7, 0)],
)
def test_a_task_of_a_slurm_array_knows_its_place(monkeypatch, count, task, lowest, highest, place):
    for name, value in (("COUNT", count), ("ID", task), ("MIN", lowest), ("MAX", highest)):
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert read_array_task() == (place, count)

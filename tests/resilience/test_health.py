"""The checks of one machine and of machines against each other."""

import dataclasses
import importlib.metadata
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hunyuan_train.engine.checkup import skewed, too_slow
from hunyuan_train.resilience import health as checks
from hunyuan_train.resilience.board import Member
from hunyuan_train.resilience.health import Health, compare, preflight, table


def test_preflight_is_fast_and_finds_this_machine_fit(tmp_path: Path) -> None:
    started = time.monotonic()
    found = preflight(tmp_path)
    assert time.monotonic() - started < 3
    assert found.complaints == []
    assert found.write_mib_s > 0
    assert found.matmul_gflops > 0
    assert "torch" in found.versions
    assert list(tmp_path.iterdir()) == [], "the probe is removed"
    assert Health.from_dict(found.to_dict() | {"from another version": 1}) == found


@pytest.mark.parametrize(
    ("limit", "value", "told"),
    [
        ("MIN_DISK_GIB", 1e9, "GiB free, at least"),
        ("MIN_WRITE_MIB_S", 1e9, "is written at"),
        ("MIN_SHM_GIB", 1e9, "--shm-size"),
        ("MIN_HOST_FREE", 2.0, "of memory are free"),
    ],
)
def test_a_failed_check_is_one_sentence_with_value_and_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, value: float, told: str
) -> None:
    monkeypatch.setattr(checks, limit, value)
    (sentence,) = preflight(tmp_path).complaints
    assert told in sentence


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (sentence,) = preflight(tmp_path / "file" / "run").complaints
    assert "check disk" in sentence


def test_apex_of_another_author_is_called_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "apex-0.9.10.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: apex\nVersion: 0.9.10\nSummary: Pyramid authentication\n"
    )
    (info / "RECORD").write_text("apex/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert importlib.metadata.version("apex") == "0.9.10"
    (sentence,) = preflight(tmp_path).complaints
    assert "is not NVIDIA's" in sentence


GPU_ROWS = """\
NVIDIA H100 80GB HBM3, 81559, 4, 1980, 1980, 0, Not Active
NVIDIA H100 80GB HBM3, 81559, 70000, 345, 1980, 2, Active
Some card, 100, 0, 1, 1, [N/A], [Not Supported]
"""


def test_gpus_in_use_broken_or_slowed_down() -> None:
    gpus = checks.parse_gpus(GPU_ROWS)
    assert gpus[0]["memory.total"] == 81559
    assert gpus[2]["ecc.errors.uncorrected.volatile.total"] is None
    sentences = list(checks.gpu_complaints(gpus))
    assert [s[:6] for s in sentences] == ["GPU 1 "] * 3
    assert "70000 of 81559 MiB in use" in sentences[0]
    assert "2 uncorrected ECC errors" in sentences[1]
    assert "slowed down" in sentences[2]


def test_a_machine_with_fewer_gpus_than_ranks_is_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{GPU_ROWS.splitlines()[0]}\nEND\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert preflight(tmp_path, ranks=1).complaints == []
    (sentence,) = preflight(tmp_path, ranks=2).complaints
    assert "lists 1 GPUs, and 2 ranks" in sentence
    assert preflight(tmp_path, ranks=2, device="cpu").complaints == []


def machines(*changes: dict[str, Any]) -> dict[int, Member]:
    usual = Health(host="h", python="3.11.7", versions={"torch": "2.13"}, matmul_gflops=100)
    healths = [dataclasses.replace(usual, **change) for change in changes]
    return {
        ticket: Member(ticket=ticket, host=f"h{ticket}", health=health.to_dict())
        for ticket, health in enumerate(healths, start=1)
    }


def test_the_odd_machine_is_named() -> None:
    assert compare(machines({}, {}, {})) == {}
    wrong = compare(machines({}, {"versions": {"torch": "2.12"}}, {}))
    assert wrong == {2: "torch is 2.12 here and 2.13 on the others"}
    assert "matrix products run at 40.0" in compare(machines({}, {}, {"matmul_gflops": 40}))[3]
    assert compare(machines({}, {"matmul_gflops": 40})) == {}, "of two nobody knows"
    assert compare(machines({}, {"python": "3.12.1"})) != {}
    assert compare({1: Member(ticket=1)}) == {}


def test_clocks_and_networks() -> None:
    here = machines({}, {})
    assert skewed(here, {1: 0.3, 2: -1.0}) == []
    (sentence,) = skewed(here, {1: 0.3, 2: -7.5})
    assert sentence.startswith("h2: its clock differs from this machine's by 7.5 s")
    row = {"node": 0, "matmul_gflops": 100.0, "allreduce_mib_s": 500.0}
    assert too_slow([row, row, row]) == []
    assert "network" in too_slow([row, row | {"allreduce_mib_s": 1.0}])[0]
    assert "rank 2" in too_slow([row, row, row | {"matmul_gflops": 10.0}])[0]


def test_the_table_has_a_column_for_each_machine() -> None:
    text = table([Health(host="one", python="3.11.7"), Health(host="two", python="3.12.1")])
    assert "one" in text.splitlines()[0]
    assert text.splitlines()[1].split() == ["python", "3.11.7", "3.12.1"]


@pytest.mark.slow
@pytest.mark.dist
def test_doctor_on_two_machines_measures_the_network_and_exits_with_the_verdict(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "hunyuan_train", "doctor", f"run.dir={tmp_path}"]
    both = [
        subprocess.Popen([*command, "launch.nodes=2"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in both:
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
        assert "all-reduce, 2 ranks" in text
        assert "all checks hold" in text

"""Every script of benchmarks/ runs at a tiny size and ends with one JSON object."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if path.name[0] != "_")
NEEDS = {"vs_diffusers": "diffusers", "long_clip": "diffusers"}
"""Packages without which a script has nothing to measure."""
REPEATS = ("mixed_scale", "curriculum_kills", "latent_service", "vae_training")
"""Scripts that run a part of what another script or test does."""


def cases() -> list[Any]:
    """Return all scripts; those that repeat something are left to the longer run."""
    return [
        pytest.param(path, marks=[pytest.mark.again] if path.stem in REPEATS else [], id=path.stem)
        for path in SCRIPTS
    ]


def environment() -> dict[str, str]:
    """Return the variables of a script: this package first, and no threads to fight with."""
    paths = (str(ROOT), str(ROOT / "kernels"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("script", cases())
def test_it_runs_quickly_and_reports_in_json(script: Path) -> None:
    if script.stem in NEEDS:
        pytest.importorskip(NEEDS[script.stem])
    text = script.read_text()
    device = ["--device", "cpu"] if '"--device"' in text else []
    command = [sys.executable, str(script), "--quick", *device]
    done = subprocess.run(
        command, env=environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["benchmark"] == script.stem
    assert last["machine"]
    assert last["figures"]
    assert all(isinstance(figure, dict) for figure in last["figures"].values())


def test_the_gpu_scripts_are_all_started_and_one_failure_is_not_lost(tmp_path: Path) -> None:
    """``make bench-gpu`` with a Python that fails for the second script."""
    log, python = tmp_path / "log", tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$@" >> {log}\ncase "$1" in *blocks*) exit 1;; esac\n')
    python.chmod(0o755)
    (tmp_path / ".ready").touch()
    command = ["make", "bench-gpu", f"VENV={tmp_path}", "ARGS=--quick", "-o", f"{tmp_path}/.ready"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    started = [Path(line.split()[0]).stem for line in log.read_text().splitlines()]
    assert started == ["attention", "blocks", "kernels", "offload", "planner_error", "one_gpu"]
    assert all(line.endswith(" --quick") for line in log.read_text().splitlines())
    assert "failed: blocks" in done.stdout

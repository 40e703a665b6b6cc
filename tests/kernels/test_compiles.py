"""The compiled form of the kernels, as far as it shows without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.kernel
def test_every_kernel_compiles_for_hopper(tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    kernels = Path(__file__).parents[2] / "kernels"
    environment["PYTHONPATH"] = f"{kernels}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    script = Path(__file__).with_name("compile_for_hopper.py")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert len({row["kernel"] for row in compiled}) == 10
    assert all(row["cubin"] > 0 for row in compiled)

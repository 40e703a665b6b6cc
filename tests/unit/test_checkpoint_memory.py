"""Resuming takes no more memory than training did."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RUN = """
import json, sys
from pathlib import Path
import torch
from torch import nn
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.manager import CheckpointManager
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.groups import build_optimizer, optimizer_tensors
from hunyuan_train.runtime.device import peak_memory_bytes

verb, folder = sys.argv[1:]
torch.set_num_threads(1)
model = nn.Sequential(*(nn.Linear(1152, 1152) for _ in range(14)))  # 74 MB, 300 MB with its state
cfg = OptimizerConfig(lr=1e-2)
optimizer, ema = build_optimizer(model, cfg), Ema(model, cfg)
tensors = {
    "model": dict(model.named_parameters()),
    "ema": ema.state_dict(),
    "optimizer": optimizer_tensors(optimizer),
}
manager = CheckpointManager(Path(folder), CheckpointConfig(), {})
before = peak_memory_bytes(torch.device("cpu"))
step = 0
if verb == "resume":
    step = manager.restore(tensors).step
elif verb == "train":
    for step in range(1, 3):
        model(torch.ones(4, 1152)).square().mean().backward()
        optimizer.step()
        ema.update(step)
peak = peak_memory_bytes(torch.device("cpu"))
if verb == "train":
    assert manager.save(step, tensors, {})
print(json.dumps({"before": before, "peak": peak, "step": step}))
"""


def run(verb: str, folder: Path) -> dict[str, int]:
    done = subprocess.run(
        [sys.executable, "-c", RUN, verb, str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_resuming_takes_no_more_memory_than_training(tmp_path: Path):
    trained, resumed = run("train", tmp_path), run("resume", tmp_path)
    assert resumed["step"] == 2
    assert resumed["peak"] <= trained["peak"]
    # Besides the state, which is there before: the largest tensor, twice, and the code to read it.
    assert resumed["peak"] - resumed["before"] < 40 << 20

"""The fused kernel under the trainer: the same weights, moments and average as without."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hunyuan_kernels import dispatch
from hunyuan_train.memory.config import AveragePlace
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.plain import PlainAdamW
from hunyuan_train.optim.updates import build_updates, update_weights
from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import Axes

CFG = OptimizerConfig(lr=1e-2, weight_decay=0.2, ema_decay=0.9)
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


class Trial:
    def __init__(
        self,
        device: str = "cpu",
        place: AveragePlace = AveragePlace.device,
        cfg: OptimizerConfig = CFG,
    ):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(24, 33), nn.LayerNorm(33), nn.Linear(33, 7)).to(device)
        for param in module.parameters():
            nn.init.normal_(param, std=0.3)
        model = ParallelModel(module, Axes.alone(), {}, frozenset())
        self.updates = build_updates(model, ParallelConfig(zero_stage=0), cfg)
        self.ema = Ema(module, cfg, self.updates.local_weights(), place)
        self.device = device

    def train(self, updates: int, max_norm: float = 0.1, spoil: int = -1) -> list[torch.Tensor]:
        norms = []
        for number in range(updates):
            self.updates.start_update(number)
            x = torch.randn(5, 24, generator=torch.Generator().manual_seed(number))
            loss = self.updates.module(x.to(self.device)).square().sum()
            self.updates.backward(loss * (math.nan if number == spoil else 1.0), last=True)
            norm = self.updates.clip(max_norm)
            norms += [norm, update_weights(self.updates, self.ema, norm, number)]
        return norms

    def state(self) -> dict:
        return {
            "weights": self.updates.local_weights(),
            "ema": self.ema.state_dict(),
            "moments": self.updates.local_moments(),
        }


@pytest.mark.kernel
@pytest.mark.parametrize("place", list(AveragePlace))
def test_the_kernel_gives_the_same_state(place, monkeypatch):
    eager, fused = Trial(place=place), Trial(place=place)
    wanted = eager.train(4)
    calls = []
    step = PlainAdamW.fused_step

    def counted(rule, norm, factor, averages, decay):
        calls.append(averages is not None)
        return step(rule, norm, factor, averages, decay)

    monkeypatch.setattr(PlainAdamW, "fused_step", counted)
    with dispatch.also_on("cpu"):
        found = fused.train(4)
    # A moving average that no kernel takes along moves after it.
    assert calls == [place is AveragePlace.device] * 4
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(fused.state(), eager.state(), **CLOSE)


@pytest.mark.kernel
@pytest.mark.parametrize("changes", [{"unfreeze": {"0.*": 3}}, {"trainable": ["1.*", "2.*"]}])
def test_what_is_frozen_stays_and_its_average_follows(changes):
    eager, fused = (Trial(cfg=replace(CFG, **changes)) for _ in range(2))
    for trial in (eager, fused):
        for shadow in trial.ema.state_dict().values():
            shadow.mul_(2.0)  # else what is frozen equals its average
    wanted = eager.train(4)
    with dispatch.also_on("cpu"):
        found = fused.train(4)
    torch.testing.assert_close(found, wanted, **CLOSE)
    torch.testing.assert_close(fused.state(), eager.state(), **CLOSE)


@pytest.mark.kernel
def test_a_skipped_update_leaves_everything_alone():
    trial = Trial()
    with dispatch.also_on("cpu"):
        trial.train(2)
        before = {k: torch.utils._pytree.tree_map(torch.clone, v) for k, v in trial.state().items()}
        assert trial.train(1, spoil=0)[1] == 1
    torch.testing.assert_close(trial.state(), before, rtol=0, atol=0)


@pytest.mark.kernel
def test_gradients_that_are_looked_at_are_clipped_once():
    eager, fused = Trial(), Trial()
    for trial in (eager, fused):
        trial.updates.backward(trial.updates.module(torch.ones(2, 24)).square().sum(), last=True)
    wanted = eager.updates.clip(0.1)
    expected = {n: g.clone() for n, g in eager.updates.local_gradients().items()}
    update_weights(eager.updates, eager.ema, wanted, 0)
    with dispatch.also_on("cpu"):
        norm = fused.updates.clip(0.1)
        torch.testing.assert_close(fused.updates.local_gradients(), expected, **CLOSE)
        torch.testing.assert_close(fused.updates.local_gradients(), expected, **CLOSE)
        update_weights(fused.updates, fused.ema, norm, 0)
    torch.testing.assert_close(fused.state(), eager.state(), **CLOSE)


@pytest.mark.gpu
def test_on_a_gpu():
    fused, eager = Trial("cuda"), Trial("cuda")
    fused.train(4)
    dispatch.set_enabled("adamw_ema", False)
    try:
        eager.train(4)
    finally:
        dispatch.set_enabled("adamw_ema", None)
    torch.testing.assert_close(fused.state(), eager.state(), **CLOSE)

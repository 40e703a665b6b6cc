"""The learning rate against torch's own schedulers, and its edges."""

import math
from itertools import pairwise

import pytest
import torch

from hunyuan_train.optim.config import OptimizerConfig, ScheduleKind
from hunyuan_train.optim.schedule import learning_rate, set_learning_rate


def test_warmup_rises_linearly_and_reaches_the_rate_at_its_last_step():
    cfg = OptimizerConfig(lr=4e-4, warmup_steps=4)
    rates = [learning_rate(step, cfg, 100) for step in range(6)]
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])


def test_without_warmup_the_first_rate_is_the_full_one():
    assert learning_rate(0, OptimizerConfig(lr=2e-3, warmup_steps=0), 10) == 2e-3


def test_cosine_equals_torch_cosine_annealing_after_the_warmup():
    cfg = OptimizerConfig(lr=1e-3, warmup_steps=5, schedule=ScheduleKind.cosine, min_lr_ratio=0.1)
    total = 30
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.lr)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(
        optimizer, T_max=total - 1 - cfg.warmup_steps, eta_min=cfg.min_lr_ratio * cfg.lr
    )
    for step in range(cfg.warmup_steps, total):
        assert learning_rate(step, cfg, total) == pytest.approx(oracle.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("kind", [ScheduleKind.cosine, ScheduleKind.linear])
def test_decay_ends_at_the_smallest_rate_and_stays_there(kind: ScheduleKind):
    cfg = OptimizerConfig(lr=1.0, warmup_steps=3, schedule=kind, min_lr_ratio=0.25)
    rates = [learning_rate(step, cfg, 20) for step in range(25)]
    assert rates[3] == 1.0
    assert rates[19:] == pytest.approx([0.25] * 6)
    assert all(earlier > later for earlier, later in pairwise(rates[3:20]))


def test_linear_is_half_way_in_the_middle():
    cfg = OptimizerConfig(lr=1.0, warmup_steps=0, schedule=ScheduleKind.linear, min_lr_ratio=0.0)
    assert learning_rate(5, cfg, 11) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_a_run_shorter_than_its_warmup_or_of_one_step_has_finite_rates(kind: ScheduleKind):
    cfg = OptimizerConfig(lr=1.0, warmup_steps=10, schedule=kind)
    assert all(0 < learning_rate(step, cfg, 3) <= 1.0 for step in range(3))
    no_warmup = OptimizerConfig(lr=1.0, warmup_steps=0, schedule=kind)
    assert math.isfinite(learning_rate(0, no_warmup, 1))


def test_set_learning_rate_reaches_every_group():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]

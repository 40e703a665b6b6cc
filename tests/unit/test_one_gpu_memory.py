"""What the states of the 12.82B model take on one GPU, against the config's own arithmetic."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.engine.build import init_weights, lay_out
from hunyuan_train.engine.state import TrainState
from hunyuan_train.engine.step import train_step
from hunyuan_train.engine.trial import MicroBatch, make_batch
from hunyuan_train.memory.config import AveragePlace, MemoryConfig, Place, StateType, WeightType
from hunyuan_train.memory.estimate import Layout, Work, estimate
from hunyuan_train.memory.states import FLOAT32_STATES, state_bytes
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import build_updates
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.resilience.guard import Guard
from hunyuan_train.runtime.dist import World

YAML = Path(__file__).parents[2] / "conf" / "memory" / "one_h200.yaml"
GIB = 2**30


def composed(*overrides: str):
    model = ("model=hunyuan_video_13b_cfg", "stage=hunyuan_video_low_short", "cluster=h200")
    return compose_config([*model, "memory=one_h200", *overrides])


def bytes_of(tensors) -> int:
    flat = torch.utils._pytree.tree_leaves(tensors)
    return sum(t.numel() * t.element_size() for t in flat if isinstance(t, Tensor) and t.ndim)


def built(cfg) -> dict[str, int]:
    """Return the bytes of all states of a model without storage."""
    model, _ = lay_out(cfg, Axes.alone(), torch.device("meta"))
    updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory, 0)
    weights = updates.local_weights()
    return {
        "weights": bytes_of(weights),
        "moments": bytes_of(updates.local_moments()),
        "average": bytes_of(Ema(model.module, cfg.optimizer, weights, cfg.memory.ema).state_dict()),
    }


def claims() -> dict[str, float]:
    lines = re.findall(r"^#   (\w+) +([\d.]+)", YAML.read_text(), flags=re.MULTILINE)
    return {name: float(number) for name, number in lines}


def test_the_states_take_what_the_config_says_and_the_estimate_too():
    cfg, claimed = composed(), claims()
    held = built(cfg)
    assert {name: round(size / 1e9, 1) for name, size in held.items()} == {
        name: claimed[name] for name in held
    }
    assert round(sum(held.values()) / 1e9, 1) == claimed["states"]
    layout = Layout(zero_stage=3, weight_bytes=2)
    parts = estimate(
        cfg.model,
        layout,
        Work(img_tokens=17 * 16 * 16, txt_tokens=256, recompute=cfg.memory.recompute),
        state_bytes(cfg.memory),
    )
    assert parts.parameters == held["weights"]
    assert parts.optimizer == pytest.approx(held["moments"], rel=1e-3)
    assert parts.average == held["average"]
    assert parts.gradients == parts.gathered == parts.host == 0
    assert round(parts.activations / 1e9, 1) == claimed["activations"]
    assert round(state_bytes(cfg.memory).update / 1e9, 1) == claimed["update"]
    free = cfg.cluster.memory_bytes - cfg.cluster.reserve_bytes
    assert parts.total < free
    assert parts.total + 3 * held["moments"] - 3e9 > free  # no room for float32 moments
    assert sum(held.values()) < 0.8 * 128 * GIB  # the copy of a checkpoint on the host


def test_every_choice_is_counted():
    assert state_bytes(MemoryConfig()) == FLOAT32_STATES
    chosen = MemoryConfig(optimizer_device=Place.host, ema=AveragePlace.host)
    assert state_bytes(chosen).host == 12
    assert (state_bytes(chosen).total, state_bytes(chosen).gradient) == (8, 4)
    chosen = replace(chosen, optimizer_states=StateType.int8, ema=AveragePlace.off)
    assert state_bytes(chosen).host == 2.03125
    assert state_bytes(MemoryConfig(weights=WeightType.bfloat16)).total == 16
    assert state_bytes(MemoryConfig(fused_backward=True)).total == 16


def test_one_rank_that_keeps_what_it_computes_with_gathers_nothing():
    narrow, wide = Layout(weight_bytes=2), Layout()
    assert (narrow.casts, wide.casts) == (False, True)
    assert Layout(weight_bytes=2, world=2).casts


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.clip_norm=1"], r"optimizer.clip_norm=1.0 cannot be kept; set it to 0"),
        (["parallel.compute_dtype=float32"], r"set that to bfloat16 or memory.weights=float32"),
        (["parallel.zero_engine=deepspeed"], r"memory.weights=bfloat16 needs parallel.zero_engine"),
        (["parallel.tp=2"], r"memory.optimizer_states=int8 is not offered with parallel.tp=2"),
    ],
)
def test_choices_that_do_not_go_together_end_in_a_sentence(overrides, message):
    cfg = composed(*overrides)
    small = replace(cfg.model, num_double_blocks=1, num_single_blocks=1)
    model, _ = lay_out(replace(composed(), model=small), Axes.alone(), torch.device("meta"))
    with pytest.raises(ValueError, match=message):
        build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory)


def test_a_loss_the_guard_refuses_is_refused_before_the_backward(monkeypatch):
    small = ("num_double_blocks=1", "num_single_blocks=1", "refiner_depth=1")
    cfg = compose_config(["model=tiny", "memory=one_h200", *(f"model.{field}" for field in small)])
    cpu = torch.device("cpu")
    model, rules = lay_out(cfg, Axes.alone(), cpu)
    updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory, 0)
    init_weights(updates, rules, 0)
    weights = updates.local_weights()
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    state = TrainState(
        model=model,
        updates=updates,
        ema=Ema(model.module, cfg.optimizer, weights),
        loader=None,
        guard=Guard(cfg.resilience),
        skipped_updates=torch.zeros(()),
    )
    world = World(rank=0, local_rank=0, size=1, device=cpu)
    batch = make_batch(cfg, MicroBatch(Bucket(1, 64, 64), (8,)), 0, 8)
    before = {name: weight.clone() for name, weight in weights.items()}
    with monkeypatch.context() as patch:
        patch.setattr(Guard, "screen", lambda guard, loss, norm, kind="": norm + torch.inf)
        metrics = train_step(state, [batch], cfg, world, 1.0)
    assert torch.isfinite(metrics.grad_norm)
    assert metrics.grad_norm > 0
    assert state.skipped_updates == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights.items())
    train_step(state, [batch], cfg, world, 1.0)
    assert state.skipped_updates == 1
    assert not all(torch.equal(weight, before[name]) for name, weight in weights.items())
    with pytest.raises(ValueError, match=r"this update has several micro-steps; set stage.micro"):
        train_step(state, [batch, batch], cfg, world, 1.0)

"""What a stage takes over from another run, on every layout and engine."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_distributed
from filled_states import config, fresh_state, save, save_filled, stored
from torch import Tensor

from hunyuan_train.config.curriculum import Carried, Transform
from hunyuan_train.engine.start import INPUT_WEIGHT, start_from
from hunyuan_train.engine.state import scheduled_rate

LAYOUTS = ["zero_stage=0", "zero_stage=2", "zero_stage=3", "tp=2", "tp=2 sp=true"]
LARGER = {"in_channels": 33, "image_condition": "concat", "guidance_embed": True}
BOTH = [Transform.input_channels, Transform.guidance_embed]
EVERYTHING = list(Carried)


def started(
    rank: int, world: int, source: str, run: str, fields: list[str], stage: dict, model: dict
) -> dict[str, Any]:
    """Start from a run, save at once and return the counters."""
    cfg = config(*fields, f"stage.init_from={source}", **model)
    for name, value in stage.items():
        setattr(cfg.stage, name, value)
    state = fresh_state(cfg, world)
    start_from(state, cfg)
    save(state, cfg, Path(run))
    return {**state.counters(), "rate": scheduled_rate(state, cfg)}


def check_larger(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """Compare all that a small model gave with what the larger one has."""
    for name, tensor in after.items():
        section, parameter, *key = name.split("/")
        if section == "counters":
            continue
        if parameter.startswith("guidance_in."):
            assert name not in before
            zero = section == "optimizer" or parameter.startswith("guidance_in.mlp.2")
            assert bool((tensor == 0).all()) == (zero or key == ["step"]), name
            if section == "ema":
                torch.testing.assert_close(tensor, after[f"model/{parameter}"], rtol=0, atol=0)
        elif parameter == INPUT_WEIGHT and key != ["step"]:
            assert tensor.shape[1] == 33
            assert torch.equal(tensor[:, :16], before[name]), name
            assert not tensor[:, 16:].any(), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert before.keys() <= after.keys()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_filled(config(), tmp_path_factory.mktemp("source"))


def start_one(source: Path, run: Path, *fields: str, model: dict | None = None, **stage: Any):
    return started(0, 1, str(source), str(run), list(fields), stage, model or {})


def test_a_larger_model_takes_over_everything(source: Path, tmp_path: Path) -> None:
    found = start_one(source, tmp_path, model=LARGER, carry=EVERYTHING, transform=BOTH)
    check_larger(stored(source), stored(tmp_path))
    assert found["loader"] == {"place": 77}
    assert (found["averaged_before"], found["scheduled_before"], found["step"]) == (40, 40, 0)


@pytest.mark.dist
@pytest.mark.parametrize("fields", LAYOUTS)
def test_on_every_layout(source: Path, tmp_path: Path, fields: str) -> None:
    layout = [f"parallel.{field}" for field in fields.split()]
    stage = {"carry": EVERYTHING, "transform": BOTH}
    run_distributed(started, 2, str(source), str(tmp_path), layout, stage, LARGER)
    check_larger(stored(source), stored(tmp_path))


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("zero", [2, 3])
def test_with_deepspeed(source: Path, tmp_path: Path, zero: int) -> None:
    pytest.importorskip("deepspeed")
    layout = [f"parallel.zero_stage={zero}", "parallel.zero_engine=deepspeed"]
    stage = {"carry": EVERYTHING, "transform": BOTH}
    run_distributed(started, 2, str(source), str(tmp_path), layout, stage, LARGER)
    after = stored(tmp_path)
    # Parameters of one flat tensor share one count of updates there.
    check_larger(stored(source), {n: t for n, t in after.items() if not n.endswith("/step")} | {
        n: t for n, t in after.items() if n.endswith("/step") and "guidance_in" not in n
    })  # fmt: skip


def test_what_is_not_carried_stays_fresh(source: Path, tmp_path: Path) -> None:
    found = start_one(source, tmp_path, carry=[Carried.weights])
    before, after = stored(source), stored(tmp_path)
    for name, tensor in after.items():
        section, rest = name.split("/", 1)
        if section in ("model", "ema"):
            assert torch.equal(tensor, before[f"model/{rest}"]), name
        elif section == "optimizer":
            assert not tensor.any(), name
    assert found["loader"] == {"place": 0}
    assert (found["averaged_before"], found["scheduled_before"]) == (0, 0)


def test_the_average_alone_becomes_the_weights(source: Path, tmp_path: Path) -> None:
    start_one(source, tmp_path, carry=[Carried.ema])
    before, after = stored(source), stored(tmp_path)
    for name, tensor in after.items():
        section, rest = name.split("/", 1)
        if section in ("model", "ema"):
            assert torch.equal(tensor, before[f"ema/{rest}"]), name


def test_schedule_goes_on_without_a_second_warm_up(source: Path, tmp_path: Path) -> None:
    fields = ["optimizer.lr=1e-3", "optimizer.warmup_steps=30", "optimizer.schedule=cosine"]
    fields += ["stage.steps=60", "optimizer.min_lr_ratio=0"]
    again = start_one(source, tmp_path / "a", *fields)
    assert again["rate"] == pytest.approx(1e-3 / 30)
    carry = [Carried.weights, Carried.schedule]
    found = start_one(source, tmp_path / "b", *fields, carry=carry)
    # 10 of the 69 updates of the fall are done.
    assert found["rate"] == pytest.approx(0.5e-3 * (1 + math.cos(10 / 69 * math.pi)))
    found = start_one(source, tmp_path / "c", *fields, "stage.schedule_steps=41", carry=carry)
    assert found["rate"] == pytest.approx(0, abs=1e-9)


def test_outputs_of_the_larger_model_are_those_of_the_smaller(source: Path) -> None:
    small, large = config(), config(**LARGER)
    for cfg in (small, large):
        cfg.stage.init_from = str(source)
    large.stage.transform = BOTH
    outputs = []
    generator = torch.Generator().manual_seed(0)
    noisy, extra = (torch.randn(2, n, 3, 4, 6, generator=generator) for n in (16, 17))
    time, text = torch.tensor([300.0, 900.0]), torch.randn(2, 5, 64, generator=generator)
    pooled = torch.randn(2, 64, generator=generator)
    for cfg, latents, guidance in (
        (small, noisy, None),
        (large, torch.cat([noisy, extra], 1), torch.tensor([1000.0, 6000.0])),
    ):
        state = fresh_state(cfg)
        start_from(state, cfg)
        outputs.append(state.model.module(latents, time, text, None, pooled, guidance))
    assert outputs[0].abs().max() > 0.1
    # The longer sum of the patch projection rounds otherwise.
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "stage", "message"),
    [
        (LARGER, {}, "model.in_channels is 16 there and 33 here, which takes the transform"),
        ({"guidance_embed": True}, {}, "which takes the transform guidance_embed"),
        ({}, {"transform": BOTH}, "the transform guidance_embed has nothing to do"),
        ({"num_single_blocks": 2}, {"transform": []}, "num_single_blocks is 1 there and 2 here"),
        ({"image_condition": "concat"}, {}, "image_condition is none there and concat here"),
    ],
)
def test_an_unexplained_model_is_refused(
    source: Path, tmp_path: Path, model: dict, stage: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start_one(source, tmp_path, model=model, **stage)


def test_given_frames_that_replace_noisy_ones_need_no_transform(
    source: Path, tmp_path: Path
) -> None:
    start_one(source, tmp_path, model={"image_condition": "token_replace"})
    before, after = stored(source), stored(tmp_path)
    assert all(torch.equal(t, before[n]) for n, t in after.items() if n.startswith("model/"))


def test_8_bit_moments_are_not_widened(source: Path, tmp_path: Path) -> None:
    stage = {"carry": EVERYTHING, "transform": BOTH}
    with pytest.raises(ValueError, match="8-bit moments cannot be widened; leave optimizer out"):
        start_one(source, tmp_path, "memory.optimizer_states=int8", model=LARGER, **stage)

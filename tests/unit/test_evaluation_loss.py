"""Held-out loss: which samples at which noise, and how the losses add up."""

import math

import pytest
import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.mixture import Cell
from hunyuan_train.evaluation.loss import (
    LossTable,
    choose_rows,
    probe_batches,
    quantile_numbers,
    sigma_at,
)
from hunyuan_train.objectives.config import FlowMatchingConfig
from hunyuan_train.objectives.timesteps import sample_sigmas

IMAGE, VIDEO = Bucket(1, 64, 64), Bucket(5, 64, 96)


def cell(bucket: Bucket, first: int, count: int, concept: str = "") -> Cell:
    return Cell(
        name=f"/{concept}/{bucket}", store=0, first=first, count=count, repeat=1, bucket=bucket,
        anchor=64, concept=concept, source="",
    )  # fmt: skip


@pytest.mark.parametrize(
    "cfg",
    [
        FlowMatchingConfig(),
        FlowMatchingConfig(time_mean=0.4, time_std=0.7, shift=5.0),
        FlowMatchingConfig(shift=2.0, shift_tokens=100),
    ],
)
def test_quantiles_are_those_of_what_training_draws(cfg: FlowMatchingConfig) -> None:
    drawn = sample_sigmas(cfg, 0, list(range(4000)), [0] * 4000, 400)
    for quantile in (0.1, 0.5, 0.9):
        below = (drawn < sigma_at(quantile, cfg, 400)).double().mean().item()
        assert below == pytest.approx(quantile, abs=0.03)


def test_a_sigma_is_booked_under_the_nearest_quantile() -> None:
    cfg, quantiles = FlowMatchingConfig(shift=3.0, shift_tokens=50), [0.1, 0.5, 0.9]
    at = [sigma_at(q, cfg, 200) for q in (0.001, 0.1, 0.29, 0.31, 0.5, 0.69, 0.71, 0.9999)]
    numbers = quantile_numbers(torch.tensor(at), quantiles, cfg, 200)
    assert numbers.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert quantile_numbers(torch.tensor(at), [0.5], cfg, 200).tolist() == [0] * 8


def test_rows_are_spread_evenly_over_all_cells_of_a_bucket() -> None:
    cells = [cell(IMAGE, 0, 6), cell(VIDEO, 6, 2), cell(IMAGE, 8, 6, "dogs")]
    assert choose_rows(cells, 4) == {IMAGE: [0, 3, 8, 11], VIDEO: [6, 7]}
    assert choose_rows(cells, 99)[IMAGE] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]


def test_every_probe_is_in_one_batch_of_its_bucket() -> None:
    rows = {IMAGE: [0, 3], VIDEO: [6]}
    batches = probe_batches(rows, 3, {IMAGE: 4, VIDEO: 2})
    assert [(b.bucket, len(b.probes)) for b in batches] == [
        (VIDEO, 2), (IMAGE, 4), (VIDEO, 1), (IMAGE, 2)
    ]  # fmt: skip
    found = sorted((p.row, p.quantile) for b in batches for p in b.probes)
    assert found == [(row, level) for row in (0, 3, 6) for level in range(3)]


def test_means_weigh_tokens_and_leave_out_what_was_not_measured() -> None:
    table = LossTable([IMAGE, VIDEO], [0.25, 0.75])
    table.add(IMAGE, 0, 8.0, 4)
    table.add(IMAGE, 0, 2.0, 4)
    table.add(VIDEO, 0, 2.0, 2)
    row = table.row("ema/")
    assert row == {
        "ema/loss": 1.2,
        "ema/q0.25": 1.2,
        "ema/1x64x64": 1.25,
        "ema/1x64x64/q0.25": 1.25,
        "ema/5x64x96": 1.0,
        "ema/5x64x96/q0.25": 1.0,
    }
    assert math.isnan(LossTable([IMAGE], [0.5]).mean)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.every_steps=5", r"every_steps=5 needs evaluation\.latents"),
        ("evaluation.sample_every=5", r"sample_every=5 needs evaluation\.prompts"),
        ("evaluation.sample_every=-1", r"sample_every=-1 must be 0 \(off\) or more"),
        ("evaluation.quantiles=[0.5,0.2]", r"quantiles=\[0\.5, 0\.2\] must be numbers between"),
        ("evaluation.quantiles=[]", r"quantiles=\[\] must be numbers"),
        ("evaluation.quantiles=[0.5,1.0]", r"must be numbers between 0 and 1"),
        ("evaluation.samples_per_bucket=0", r"samples_per_bucket=0 must be at least 1"),
    ],
)
def test_settings_that_measure_nothing_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose_config([override])

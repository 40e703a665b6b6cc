"""The draw on data small enough to check by hand, and what a changed run is told."""

import json
from collections import Counter

import numpy as np
import pytest

from hunyuan_train.data.balance import StepPlan, UnitTable
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig, Policy, SourceConfig
from hunyuan_train.data.mixture import Cell
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.data.streams import unit_sizes


def cell(bucket: str, count: int, first: int = 0, **changes) -> Cell:
    fields = {"anchor": 256, "concept": "", "source": "a", "repeat": 1, **changes}
    name = f"{fields['source']}/{fields['concept']}/{bucket}@{fields['anchor']}x{fields['repeat']}"
    shape = Bucket.parse(bucket)
    return Cell(name=name, store=0, first=first, count=count, bucket=shape, **fields)


IMAGES, WIDE, CLIPS, LARGE = (
    cell("1x256x256", 100),
    cell("1x192x336", 30, 100),
    cell("17x256x256", 40, 130),
    cell("1x512x512", 20, 170, anchor=512),
)


def planner(
    cells: list[Cell], batch: int = 8, ranks: int = 4, micro_steps: int = 1, seed: int = 0, **config
) -> StepPlanner:
    costs = [float(item.bucket.tokens) for item in cells]
    cfg = DataConfig(**config)
    return StepPlanner(cells, costs, [batch] * len(cells), cfg, seed, ranks, micro_steps)


def plan_of(costs: list[float], counts: list[int]) -> StepPlan:
    """A step of one unit per cell."""
    cells = np.arange(len(costs))
    zeros = np.zeros(len(costs), np.int64)
    return StepPlan(UnitTable(cells, zeros, zeros, np.array(counts)), np.array(costs, float))


def test_units_cost_alike_where_memory_allows() -> None:
    cells = [IMAGES, WIDE, CLIPS, LARGE]
    costs = [float(item.bucket.tokens) for item in cells]
    assert costs == [256, 252, 1280, 1024]
    # The smallest full batch is 8 images of 252 tokens; a clip unit has the nearest cost to it.
    even = [1 / 4] * 4
    assert unit_sizes(cells, costs, [8, 8, 8, 8], even) == [8, 8, 2, 2]
    assert unit_sizes(cells, costs, [64, 64, 1, 8], even) == [5, 5, 1, 1]
    # What is never drawn does not make the others small.
    assert unit_sizes(cells, costs, [64, 64, 1, 8], [0.5, 0.2, 0.0, 0.3])[0] == 32


def test_a_round_has_one_tier_and_mixes_its_classes() -> None:
    other = cell("1x256x256", 100, source="b")
    drawn = planner([IMAGES, other, CLIPS], batch=8, ranks=4, micro_steps=1)
    costs = np.array([256.0, 256.0, 1280.0])
    for _ in range(20):
        units = drawn.next_step().units
        cells = {unit.cell for unit in units}
        assert cells in ({0, 1}, {2})
        if cells == {0, 1}:
            assert Counter(unit.cell for unit in units) == {0: 2, 1: 2}
        full = [costs[unit.cell] * drawn.unit_sizes[unit.cell] for unit in units]
        assert max(full) <= 1.05 * min(full)


def test_rounds_are_even_and_the_costliest_meet_the_cheapest() -> None:
    plan = plan_of([8, 1, 7, 2, 6, 3, 5, 4], [1] * 8)
    sums = [sum(unit.cell for unit in units) for units in plan.assign(4)]
    assert sum(sums) == 28
    balance = plan.balance(4)
    assert balance.step == pytest.approx(1.0)  # 8+1, 7+2, 6+3, 5+4
    assert balance.lockstep == pytest.approx(36 / (4 * (8 + 4)))


def test_heavy_units_go_to_the_ranks_with_the_least_so_far() -> None:
    costs = np.random.default_rng(3).gamma(2.0, size=64).tolist()
    plan = plan_of(costs, [1] * 64)
    assert plan.balance(8).step > 0.98
    flat = [unit.cell for units in plan.assign(8) for unit in units]
    assert sorted(flat) == list(range(64))


def test_a_step_that_does_not_divide_splits_its_costliest_units() -> None:
    plan = plan_of([1.0, 3.0], [4, 4])
    rounds = plan.assign(3)
    assert sorted((u.cell, u.start, u.count) for units in rounds for u in units) == [
        (0, 0, 4), (1, 0, 2), (1, 2, 2),
    ]  # fmt: skip
    assert all(unit.weight == 1.0 for units in rounds for unit in units)
    assert plan.assign(2)[0] == [plan.units[1]]
    assert len(plan.units) == 2


def test_fillers_keep_ranks_in_step_when_nothing_can_be_split() -> None:
    plan = plan_of([5.0, 1.0], [1, 1])
    rounds = plan.assign(4)
    flat = [unit for units in rounds for unit in units]
    assert [len(units) for units in rounds] == [1, 1, 1, 1]
    assert sorted((unit.weight, unit.cell) for unit in flat) == [(0, 1), (0, 1), (1, 0), (1, 1)]
    assert plan.balance(4).step == pytest.approx(6 / 20)


def test_one_sample_trains_any_number_of_ranks() -> None:
    drawn = planner([cell("1x256x256", 1)], ranks=3, micro_steps=2)
    epochs: list[int] = []
    for _ in range(4):
        plan = drawn.next_step()
        assert [len(units) for units in plan.assign(5)] == [2] * 5
        epochs += [epoch for unit in plan.units for _, epoch in drawn.rows(unit)]
    assert epochs == list(range(24))


def test_without_shuffle_samples_come_in_the_order_of_the_index() -> None:
    drawn = planner([IMAGES, WIDE], batch=8, ranks=1, micro_steps=1, shuffle=False)
    rows = [row for _ in range(17) for u in drawn.next_step().units for row, _ in drawn.rows(u)]
    assert rows == list(range(130))
    mixed = planner([IMAGES, WIDE], batch=8, ranks=1, micro_steps=1)
    shuffled = [row for _ in range(17) for u in mixed.next_step().units for row, _ in mixed.rows(u)]
    assert sorted(shuffled) == rows != shuffled
    again = [row for _ in range(17) for u in mixed.next_step().units for row, _ in mixed.rows(u)]
    assert sorted(again) == rows
    assert again != shuffled


def test_every_epoch_has_its_own_order_of_units() -> None:
    drawn = planner([IMAGES, WIDE], ranks=1)
    units = [drawn.next_step().units[0] for _ in range(3 * 17)]  # 17 units make an epoch
    orders = {tuple((u.cell, u.start) for u in units[at : at + 17]) for at in (0, 17, 34)}
    assert len(orders) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_repeats_are_passes_with_their_own_order_and_keyed_epoch() -> None:
    drawn = planner([cell("1x256x256", 5, 10, repeat=3)], batch=4, ranks=1)
    rows: list[tuple[int, int]] = []
    for _ in range(8):  # two epochs of 15 samples, four units each
        rows += [row for unit in drawn.next_step().units for row in drawn.rows(unit)]
    assert sorted(rows) == [(row, epoch) for row in range(10, 15) for epoch in range(6)]


def test_a_cut_unit_goes_on_in_the_next_update() -> None:
    drawn = planner([cell("1x256x256", 40)], batch=8, ranks=2, global_samples=10, shuffle=False)
    rows: list[int] = []
    for _ in range(4):
        plan = drawn.next_step()
        assert plan.samples == 10
        assert all(unit.count <= 5 for unit in plan.units)  # 10 over two ranks
        rows += [row for unit in plan.units for row, _ in drawn.rows(unit)]
    assert rows == list(range(40))
    odd = planner([cell("1x256x256", 21)], batch=8, ranks=2, global_samples=7, shuffle=False)
    rows = [row for _ in range(3) for u in odd.next_step().units for row, _ in odd.rows(u)]
    assert rows == list(range(21))
    # The state knows of the cut.
    odd = planner([cell("1x256x256", 21)], batch=8, ranks=2, global_samples=7, shuffle=False)
    odd.next_step()
    assert odd.state_dict()["offset"] == {"0": 3}


def test_mixture_errors_shrink_with_the_steps() -> None:
    cells = [IMAGES, WIDE, CLIPS, LARGE]
    drawn = planner(cells, media_shares={"image": 0.85, "video": 0.15}, anchor_shares={"512": 0.05})
    counts = np.zeros(4)
    errors: list[float] = []
    for step in range(1, 1001):
        for unit in drawn.next_step().units:
            counts[unit.cell] += unit.count
        if step in (10, 100, 1000):
            found = np.array([counts[:2].sum(), counts[2], counts[3]]) / counts.sum()
            errors.append(np.abs(found / [0.80, 0.15, 0.05] - 1).max())
    assert errors[2] < 0.01
    assert errors[0] > errors[1] > errors[2]


def test_random_policy_draws_full_batches_and_ends_at_the_same_shares() -> None:
    shares = {"image": 0.5, "video": 0.5}
    drawn = planner(
        [IMAGES, CLIPS], policy=Policy.random, media_shares=shares, ranks=4, micro_steps=4
    )
    assert drawn.unit_sizes == [8, 8]
    counts, mixed_steps = np.zeros(2), 0
    for _ in range(300):
        plan = drawn.next_step()
        units = plan.units
        mixed_steps += len({unit.cell for unit in units}) == 2
        assert plan.assign(4)[1] == units[1::4]
        for unit in units:
            counts[unit.cell] += unit.count
    assert mixed_steps > 290
    assert abs(counts[0] / counts.sum() - 0.5) < 0.03


def test_a_source_leaves_when_its_epochs_are_over() -> None:
    cells = [IMAGES, cell("1x256x256", 30, source="b")]
    sources = {"a": SourceConfig(latents="a"), "b": SourceConfig(latents="b", epochs=2)}
    drawn = planner(cells, sources=sources, ranks=2)
    counts = Counter()
    for _ in range(60):
        for unit in drawn.next_step().units:
            counts[unit.cell] += unit.count
    assert counts[1] == 60
    assert counts[0] > 600


def test_the_end_of_all_sources_is_one_sentence() -> None:
    sources = {"a": SourceConfig(latents="a", epochs=1)}
    drawn = planner([cell("1x256x256", 10)], sources=sources, ranks=1)
    assert [drawn.next_step().samples for _ in range(2)] == [8, 2]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"after 2 updates: the sources 'a' reached their data\.sources epochs"
        ):
            drawn.next_step()


def test_tokens_below_one_sample_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.global_tokens=1000 is below the 1280 image tokens .* 17x256x256"
    ):
        planner([IMAGES, CLIPS], global_tokens=1000)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, r"\(seed 0 then, 1 now\)"),
        ({"policy": Policy.random}, r"batches up to .* then, up to 8 .* policy balanced then, ran"),
        ({"shuffle": False}, r"\(shuffle True then, False now\)"),
        ({"batch": 4}, r"\(batches up to 8 \(\w+\) then, up to 4 \(\w+\) now\)"),
        ({"media_shares": {"image": 0.5, "video": 0.5}}, r"\(shares \w+ then, \w+ now\)"),
        ({"cells": [IMAGES]}, r"cells 2 with 140 samples \(\w+\) then, 1 with 100 .* now"),
    ],
)
def test_a_state_of_other_data_names_what_differs(changes: dict, named: str) -> None:
    then = planner([IMAGES, CLIPS])
    then.next_step()
    now = planner(**{"cells": [IMAGES, CLIPS], "ranks": 2, **changes})
    before = now.state_dict()
    with pytest.raises(ValueError, match=named) as error:
        now.load_state_dict(json.loads(json.dumps(then.state_dict())))
    assert "\n" not in str(error.value)
    assert now.state_dict() == before
    now.next_step()


def test_a_resumed_run_keeps_the_planned_ranks_and_may_change_the_rounds() -> None:
    then = planner([IMAGES, CLIPS], ranks=6)
    then.next_step()
    now = planner([IMAGES, CLIPS], ranks=2, micro_steps=3)
    now.load_state_dict(then.state_dict())
    assert len(now.next_step().units) == 6 * 3
    assert now.state_dict()["planned_ranks"] == 6


def test_state_stays_small_whatever_the_number_of_samples() -> None:
    drawn = planner([cell("1x256x256", 2**39), cell("17x256x256", 2**39, 2**39)], ranks=512)
    for _ in range(3):
        plan = drawn.next_step()
    assert len(json.dumps(drawn.state_dict())) < 600
    assert len({row for unit in plan.units[:50] for row in drawn.rows(unit)}) >= 50

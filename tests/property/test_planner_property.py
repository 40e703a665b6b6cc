"""The draw, for any cells, batches, shares, sizes of an update, ranks and stopping points."""

import json
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hunyuan_train.data.balance import StepPlan, Unit
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig, Policy, SourceConfig
from hunyuan_train.data.mixture import Cell
from hunyuan_train.data.planner import StepPlanner

SIZES = [(256, 256), (240, 272), (192, 336), (512, 512), (64, 64)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Everything a planner is made of."""

    cells: list[Cell]
    costs: list[float]
    batches: list[int]
    cfg: DataConfig
    seed: int

    def planner(self, ranks: int, micro_steps: int = 2) -> StepPlanner:
        return StepPlanner(
            self.cells, self.costs, self.batches, self.cfg, self.seed, ranks, micro_steps
        )


@st.composite
def cases(draw: st.DrawFn, sized: bool = True, epochs: int = 0) -> Case:
    keys = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["a", "b"]),
                st.sampled_from(["", "cat"]),
                st.sampled_from([1, 5, 17]),
                st.sampled_from(SIZES),
                st.integers(1, 3),
            ),
            min_size=1,
            max_size=6,
            unique=True,
        )
    )
    cells, first = [], 0
    for source, concept, frames, (height, width), repeat in sorted(keys):
        bucket, anchor = Bucket(frames, height, width), max(64, 256 * (height // 256))
        count = draw(st.integers(1, 40))
        cells.append(
            Cell(
                name=f"{source}/{concept}/{bucket}@{anchor}x{repeat}",
                store=0,
                first=first,
                count=count,
                repeat=repeat,
                bucket=bucket,
                anchor=anchor,
                concept=concept,
                source=source,
            )
        )
        first += count
    size: dict[str, int] = {}
    if sized:
        most = max(cell.bucket.tokens for cell in cells)
        size = draw(
            st.sampled_from([{}, {"global_samples": 1}, {"global_samples": 13}])
            | st.integers(most, 8 * most).map(lambda tokens: {"global_tokens": tokens})
        )
    mixed_media = len({cell.media for cell in cells}) == 2 and draw(st.booleans())
    cfg = DataConfig(
        policy=draw(st.sampled_from(Policy)),
        shuffle=draw(st.booleans()),
        media_shares={"image": 0.3, "video": 0.7} if mixed_media else {},
        sources={name: SourceConfig(latents=name, epochs=epochs) for name in "ab"},
        **size,
    )
    return Case(
        cells=cells,
        costs=[cell.bucket.tokens * (1 + cell.bucket.tokens / 1000) for cell in cells],
        batches=draw(st.lists(st.integers(1, 9), min_size=len(cells), max_size=len(cells))),
        cfg=cfg,
        seed=draw(st.integers(0, 5)),
    )


def class_key(cell: Cell) -> tuple[str, str, int, int]:
    return cell.source, cell.concept, cell.bucket.frames, cell.anchor


def samples_of(planner: StepPlanner, plan: StepPlan) -> list[tuple[int, int]]:
    return sorted(row for unit in plan.units for row in planner.rows(unit))


@settings(max_examples=120, deadline=None)
@given(case=cases(), ranks=st.integers(1, 9))
def test_every_class_epoch_has_each_sample_repeat_times(case: Case, ranks: int) -> None:
    planner = case.planner(ranks)
    drawn: dict[tuple[int, int], Counter[int]] = {}
    begun: dict[tuple, list[int]] = {}
    all_rows: list[tuple[int, int]] = []
    for _ in range(25):
        for unit in planner.next_step().units:
            cell = case.cells[unit.cell]
            epochs = begun.setdefault(class_key(cell), [])
            if not epochs or epochs[-1] != unit.epoch:
                epochs.append(unit.epoch)
            rows = planner.rows(unit)
            assert len(rows) == unit.count
            assert all(cell.first <= row < cell.first + cell.count for row, _ in rows)
            drawn.setdefault((unit.cell, unit.epoch), Counter()).update(row for row, _ in rows)
            all_rows += rows
    assert len(set(all_rows)) == len(all_rows), "a row was drawn twice in one keyed epoch"
    for key, epochs in begun.items():
        assert epochs == list(range(len(epochs))), "a class goes through its epochs in order"
        for number, cell in enumerate(case.cells):
            if class_key(cell) != key:
                continue
            for epoch in epochs[:-1]:
                rows = range(cell.first, cell.first + cell.count)
                assert drawn[number, epoch] == dict.fromkeys(rows, cell.repeat)


@settings(max_examples=60, deadline=None)
@given(case=cases(), ranks=st.integers(1, 9), stop=st.integers(0, 12), data=st.data())
def test_a_resumed_draw_is_the_uninterrupted_one(
    case: Case, ranks: int, stop: int, data: st.DataObject
) -> None:
    whole = case.planner(ranks)
    plans = [whole.next_step().units for _ in range(stop + 6)]
    first = case.planner(ranks)
    for _ in range(stop):
        first.next_step()
    state = json.loads(json.dumps(first.state_dict()))
    order = data.draw(st.permutations(range(len(case.cells))))
    for _ in range(3):
        first.next_step()
    resumed = case.planner(data.draw(st.integers(1, 9)))
    resumed.next_step()
    resumed.load_state_dict(state)
    assert json.loads(json.dumps(resumed.state_dict())) == state
    assert [resumed.next_step().units for _ in range(6)] == plans[stop:]
    assert resumed.step == stop + 6
    # Neither does the order in which the cells are listed matter.
    other = Case(
        cells=[case.cells[n] for n in order],
        costs=[case.costs[n] for n in order],
        batches=[case.batches[n] for n in order],
        cfg=case.cfg,
        seed=case.seed,
    ).planner(ranks)
    other.load_state_dict(state)
    for units in plans[stop:]:
        named = [(order[u.cell], u.epoch, u.start, u.count) for u in other.next_step().units]
        assert named == [(u.cell, u.epoch, u.start, u.count) for u in units]


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_changing_ranks_on_the_way_keeps_every_update(case: Case) -> None:
    whole = case.planner(8)
    expected = [samples_of(whole, whole.next_step()) for _ in range(9)]
    found: list[list[tuple[int, int]]] = []
    state = case.planner(8).state_dict()
    for ranks in (8, 3, 5):
        planner = case.planner(ranks)
        planner.load_state_dict(json.loads(json.dumps(state)))
        for _ in range(3):
            plan = planner.next_step()
            rounds = plan.assign(ranks)
            found.append(
                sorted(
                    row
                    for units in rounds
                    for unit in units
                    if unit.weight
                    for row in planner.rows(unit)
                )
            )
        state = planner.state_dict()
    assert found == expected


@settings(max_examples=150, deadline=None)
@given(case=cases(), planned=st.integers(1, 9), ranks=st.integers(1, 17))
def test_ranks_get_equal_rounds_of_legal_units(case: Case, planned: int, ranks: int) -> None:
    planner = case.planner(planned)
    for _ in range(4):
        plan = planner.next_step()
        rounds = plan.assign(ranks)
        assert len(rounds) == ranks
        assert len({len(units) for units in rounds}) == 1
        flat = [unit for units in rounds for unit in units]
        assert all(1 <= u.count <= case.batches[u.cell] for u in [*flat, *plan.units])
        real = [unit for unit in flat if unit.weight]
        assert {unit.weight for unit in flat} <= {0.0, 1.0}
        assert places(real) == places(plan.units)
        fillers = [unit for unit in flat if not unit.weight]
        if fillers:
            assert all(unit.count == 1 for unit in flat), "a unit could have been split"
            assert len(fillers) < ranks
        costs = [sum(case.costs[u.cell] * u.count for u in units) for units in rounds]
        balance = plan.balance(ranks)
        work = sum(case.costs[u.cell] * u.count for u in real)
        np.testing.assert_allclose(balance.step, work / ranks / max(costs))
        assert 0 < balance.lockstep <= balance.step + 1e-12 <= 1 + 1e-9


def places(units: list[Unit]) -> Counter[tuple[int, int, int]]:
    return Counter((u.cell, u.epoch, u.start + i) for u in units for i in range(u.count))


@settings(max_examples=60, deadline=None)
@given(case=cases(), ranks=st.integers(1, 9), micro_steps=st.integers(1, 4))
def test_updates_have_the_asked_size(case: Case, ranks: int, micro_steps: int) -> None:
    planner = case.planner(ranks, micro_steps)
    tokens = 0
    most = max(
        size * cell.bucket.tokens for size, cell in zip(planner.unit_sizes, case.cells, strict=True)
    )
    for step in range(1, 16):
        plan = planner.next_step()
        tokens += sum(unit.count * case.cells[unit.cell].bucket.tokens for unit in plan.units)
        if case.cfg.global_samples:
            assert plan.samples == case.cfg.global_samples
        elif case.cfg.global_tokens:
            assert 0 <= tokens - step * case.cfg.global_tokens < most
        else:
            assert len(plan.units) == ranks * micro_steps


@settings(max_examples=40, deadline=None)
@given(case=cases(), ranks=st.integers(1, 9))
def test_the_mixture_stays_within_rounds_of_its_shares(case: Case, ranks: int) -> None:
    assume(case.cfg.policy is Policy.balanced)
    planner = case.planner(ranks)
    drawn = np.zeros(len(case.cells))
    classes: dict[tuple, list[int]] = {}
    for number, cell in enumerate(case.cells):
        classes.setdefault(class_key(cell), []).append(number)
    for _ in range(60):
        for unit in planner.next_step().units:
            drawn[unit.cell] += unit.count
    most = ranks * max(planner.unit_sizes)
    for numbers in classes.values():
        off = drawn[numbers].sum() - planner.shares[numbers].sum() * drawn.sum()
        assert abs(off) <= 1.5 * most * (1 + len(classes) / 2)


@settings(max_examples=80, deadline=None)
@given(case=cases(epochs=2), ranks=st.integers(1, 9))
def test_epochs_end_a_source_after_exactly_its_samples(case: Case, ranks: int) -> None:
    planner = case.planner(ranks)
    drawn: Counter[int] = Counter()
    total = sum(2 * cell.draws for cell in case.cells)
    for _ in range(2 * total):
        left = total - drawn.total()
        if not left:
            break
        plan = planner.next_step()
        assert 0 < plan.samples <= left
        drawn.update(row for unit in plan.units for row, _ in planner.rows(unit))
    with pytest.raises(ValueError, match=r"all data are used up .* reached their"):
        planner.next_step()
    expected = {
        row: 2 * cell.repeat
        for cell in case.cells
        for row in range(cell.first, cell.first + cell.count)
    }
    assert drawn == expected


@settings(max_examples=60, deadline=None)
@given(case=cases(), ranks=st.integers(1, 4))
def test_replacements_are_other_rows_of_the_cell(case: Case, ranks: int) -> None:
    planner = case.planner(ranks)
    unit = planner.next_step().units[-1]
    cell = case.cells[unit.cell]
    row, epoch = planner.rows(unit)[0]
    tried = [planner.replacement(unit, 0, attempt) for attempt in range(cell.count - 1)]
    everything = set(range(cell.first, cell.first + cell.count))
    assert {other for other, _ in tried} == everything - {row}
    assert {keyed for _, keyed in tried} <= {epoch}
    if cell.count == 1:
        assert planner.replacement(unit, 0, 0) == (row, epoch)

"""Draws the units of every update, so that the mixture and the costs come out as asked."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from hunyuan_train.data.apportion import apportion, group_tiers, spread
from hunyuan_train.data.balance import StepPlan, Unit, UnitTable
from hunyuan_train.data.config import DataConfig, Policy
from hunyuan_train.data.mixture import Cell, shares
from hunyuan_train.data.permute import mixed, permute, text_key
from hunyuan_train.data.streams import ENDLESS, Place, Streams, occurrence, unit_sizes

__all__ = ["StepPlan", "StepPlanner", "Unit"]


class StepPlanner:
    """Draws one update after the other; a pure function of its arguments and its state.

    Classes of like unit cost form a tier. A round, one unit for every planned rank, is of one tier:
    the one whose next round is due first by its share of the samples drawn. Inside the round each
    class gets the units that bring it to its share; what does not divide is carried on.

    Args:
        cells: What is drawn from.
        costs: Predicted cost of one sample of each cell, in any unit.
        batches: Largest number of samples of each cell that a rank can take at once.
        cfg: Shares, policy, size of an update, shuffling.
        seed: Run seed.
        planned_ranks: Ranks with distinct data that the run starts with. A resumed run keeps those
            of the saved state.
        micro_steps: Rounds of an update where neither ``data.global_samples`` nor
            ``data.global_tokens`` is set.

    Raises:
        ValueError: The shares cannot be met, or an update cannot hold one sample.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        costs: Sequence[float],
        batches: Sequence[int],
        cfg: DataConfig,
        seed: int,
        planned_ranks: int,
        micro_steps: int,
    ) -> None:
        assert len(cells) == len(costs) == len(batches) > 0, "one cost and one batch for each cell"
        assert min(planned_ranks, micro_steps, *costs, *batches) > 0, "sizes and costs above 0"
        self.cells = list(cells)
        self.shares = shares(cells, cfg)
        self.costs = list(costs)
        self._cfg, self._seed, self._micro_steps = cfg, seed, micro_steps
        self._costs = np.array(costs, np.float64)
        self._tokens = np.array([cell.bucket.tokens for cell in cells], np.int64)
        self._batches = [int(batch) for batch in batches]
        self._cell_keys = [text_key(seed, "row order", cell.name) for cell in cells]
        self._random_key = text_key(seed, "random class")
        largest = max(range(len(cells)), key=lambda number: self._tokens[number])
        if 0 < cfg.global_tokens < self._tokens[largest]:
            raise ValueError(
                f"data.global_tokens={cfg.global_tokens} is below the {self._tokens[largest]} "
                f"image tokens of one sample of bucket {cells[largest].bucket}; raise it to that "
                "or more"
            )
        self._lay_out(planned_ranks)
        self._place = self._streams.start()
        self._credit = np.zeros(len(self._streams.names))
        self._carry = 0
        self._step = 0

    @property
    def step(self) -> int:
        """Updates drawn so far."""
        return self._step

    def next_step(self) -> StepPlan:
        """Draw the next update.

        The last one may be smaller, if every source has a last epoch.

        Raises:
            ValueError: Every source has ended; the message names them.
        """
        self._retire()
        place, credit = self._place.copy(), self._credit.copy()
        drawn: list[np.ndarray] = []
        tables: list[UnitTable] = []
        goal, filled = self._goal(), 0
        while filled < goal:
            classes = self._choose(place, credit, goal - filled, sum(map(len, drawn)))
            if not len(classes):
                break
            table = self._streams.draw(classes, place)
            place.advance(classes)
            self._settle(credit, classes, table.count)
            filled += int(self._amount(table).sum())
            drawn.append(classes)
            tables.append(table)
        if not tables:
            ended = ", ".join(repr(name) for name in sorted(set(self._streams.source)))
            raise ValueError(
                f"all data are used up after {self._step} updates: the sources {ended} reached "
                "their data.sources epochs; raise them or set one to 0"
            )
        table = tables[0] if len(tables) == 1 else _joined(tables)
        classes = drawn[0] if len(drawn) == 1 else np.concatenate(drawn)
        return self._commit(classes, table, goal)

    def rows(self, unit: Unit) -> list[tuple[int, int]]:
        """Return (row of the cell's store, epoch of keyed draws) of each sample of ``unit``."""
        cell = self.cells[unit.cell]
        turn, place = np.divmod(np.arange(unit.start, unit.start + unit.count), cell.count)
        epoch = unit.epoch * cell.repeat + turn
        if self._cfg.shuffle:
            key = np.uint64(self._cell_keys[unit.cell])
            place = permute(place, cell.count, mixed(key, epoch))
        return list(zip((cell.first + place).tolist(), epoch.tolist(), strict=True))

    def replacement(self, unit: Unit, place: int, attempt: int) -> tuple[int, int]:
        """Return another row of the same cell for the sample at ``place`` of ``unit``.

        Attempts 0, 1, ... go through all other rows of the cell in an order keyed by the sample; a
        cell of one row has no other and returns it again.
        """
        cell = self.cells[unit.cell]
        row, epoch = self.rows(unit)[place]
        others = cell.count - 1
        if not others:
            return row, epoch
        key = text_key(self._seed, "replacement", cell.name, row - cell.first, epoch)
        step = 1 + int(permute(attempt % others, others, key))
        return cell.first + (row - cell.first + step) % cell.count, epoch

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, ready for JSON: a few numbers per class."""
        cut = np.flatnonzero(self._place.offset)
        return {
            "step": self._step,
            "planned_ranks": self._ranks,
            "taken": self._place.taken.tolist(),
            "offset": {str(number): int(self._place.offset[number]) for number in cut},
            "credit": self._credit.tolist(),
            "carry": self._carry,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after a saved update, on any number of ranks.

        Raises:
            ValueError: The data or the settings that decide the draw are others than those saved.
        """
        planned = self._ranks
        self._lay_out(int(state["planned_ranks"]))
        then, now = state["fingerprint"], self._fingerprint
        differing = [
            f"{name} {then.get(name)} then, {now[name]} now"
            for name in now
            if then.get(name) != now[name]
        ]
        if differing:
            self._lay_out(planned)
            raise ValueError(
                f"the data differ from those of the checkpoint ({'; '.join(differing)}), so its "
                "position has no meaning; restore the data, their selection, shares, batch sizes "
                "and run.seed, or start a new run from the weights"
            )
        self._place = self._streams.start()
        self._place.taken[:] = state["taken"]
        for number, offset in state["offset"].items():
            self._place.offset[int(number)] = offset
        self._credit = np.array(state["credit"], np.float64)
        self._carry, self._step = int(state["carry"]), int(state["step"])

    def _lay_out(self, planned_ranks: int) -> None:
        """Build everything that depends on the number of planned ranks."""
        self._ranks = planned_ranks
        cfg, cells = self._cfg, self.cells
        batches = self._batches
        if cfg.global_samples:
            share = -(-cfg.global_samples // planned_ranks)
            batches = [min(batch, share) for batch in batches]
        if cfg.global_tokens:
            fit = (cfg.global_tokens // (planned_ranks * self._tokens)).tolist()
            batches = [min(batch, max(1, most)) for batch, most in zip(batches, fit, strict=True)]
        if cfg.policy is Policy.balanced:
            batches = unit_sizes(cells, self._costs.tolist(), batches, self.shares.tolist())
        self.unit_sizes = batches
        epochs = {name: source.epochs for name, source in cfg.sources.items()}
        self._streams = Streams(cells, batches, self._seed, cfg.shuffle, epochs)
        streams = self._streams
        self._wanted = streams.sums(self.shares)
        self._per_unit = streams.samples / streams.units
        draws = np.array([cell.draws for cell in cells])
        self._tokens_per_unit = streams.sums(draws * self._tokens) / streams.units
        self._tier, self._members = group_tiers(streams.weighted_cost(self._costs))
        self._live = np.zeros(0, bool)
        self._fingerprint = self._identity()

    def _retire(self) -> None:
        """Share out what ended classes leave, whenever one has ended."""
        live = (self._place.taken < self._streams.limit) & (self._wanted > 0)
        if len(self._live) and (live == self._live).all():
            return
        self._live = live
        self._share = np.where(live, self._wanted, 0.0)
        if live.any():
            self._share /= self._share.sum()
        self._credit = np.where(live, self._credit, 0.0)
        tiers = len(self._members)
        rate = self._share / self._per_unit
        units = np.bincount(self._tier, rate, tiers)
        samples = np.bincount(self._tier, self._share, tiers)
        self._units_of = np.divide(units, samples, out=np.zeros(tiers), where=samples > 0)
        self._pace = np.divide(units.sum(), units, out=np.full(tiers, np.inf), where=units > 0)
        self._bounded = bool((self._streams.limit[live] < ENDLESS).any())

    def _goal(self) -> int:
        """Return how much the next update holds, in the measure of ``_amount``."""
        if self._cfg.global_samples:
            return self._cfg.global_samples
        if self._cfg.global_tokens:
            return self._cfg.global_tokens + self._carry
        return self._ranks * self._micro_steps

    def _amount(self, table: UnitTable) -> np.ndarray:
        """Return what each unit adds to an update: samples, image tokens or 1."""
        if self._cfg.global_samples:
            return table.count
        if self._cfg.global_tokens:
            return table.count * self._tokens[table.cell]
        return np.ones_like(table.count)

    def _expected(self) -> np.ndarray:
        """Return the mean of ``_amount`` over an epoch of each class."""
        if self._cfg.global_samples:
            return self._per_unit
        if self._cfg.global_tokens:
            return self._tokens_per_unit
        return np.ones_like(self._per_unit)

    def _settle(self, credit: np.ndarray, classes: np.ndarray, count: np.ndarray) -> None:
        """Count ``count`` samples of ``classes`` against the shares, in place."""
        credit += self._share * count.sum()
        credit -= np.bincount(classes, count, len(credit))

    def _choose(self, place: Place, credit: np.ndarray, need: float, done: int) -> np.ndarray:
        """Return classes, int64 [n], whose next units are likely to fill ``need``."""
        left = self._streams.limit - place.taken
        expected = self._expected()
        if self._cfg.policy is Policy.random:
            return self._random(left, need, done)
        whole = not (self._cfg.global_samples or self._cfg.global_tokens)
        credit = credit.copy()
        rounds: list[np.ndarray] = []
        while need > 0:
            counts = self._round(credit, left, min(self._ranks, need) if whole else self._ranks)
            if counts is None:
                break
            left -= counts
            samples = counts * self._per_unit
            credit += self._share * samples.sum() - samples
            need -= float((counts * expected).sum())
            rounds.append(spread(counts))
        return np.concatenate(rounds) if rounds else np.zeros(0, np.int64)

    def _round(self, credit: np.ndarray, left: np.ndarray, units: float) -> np.ndarray | None:
        """Return how many units of each class make the next round, None if nothing is left."""
        is_open = self._live & (left > 0) if self._bounded else self._live
        tiers = len(self._members)
        ahead = np.bincount(self._tier, np.where(is_open, -credit, 0.0), tiers) * self._units_of
        due = np.full(tiers, np.inf)
        np.multiply(
            ahead / self._ranks + 0.5,
            self._pace,
            out=due,
            where=np.bincount(self._tier, is_open, tiers) > 0,
        )
        tier = int(np.argmin(due))
        if due[tier] == np.inf:
            return None
        members = self._members[tier]
        members = members[is_open[members]]
        counts = np.zeros(len(credit), np.int64)
        size = self._per_unit[members]
        counts[members] = apportion(credit[members] / size, self._share[members] / size, units)
        return np.minimum(counts, left)

    def _random(self, left: np.ndarray, need: float, done: int) -> np.ndarray:
        """Return classes drawn with the probability of their units, keyed by update and place."""
        is_open = self._live & (left > 0)
        if not is_open.any():
            return np.zeros(0, np.int64)
        reach = np.cumsum(np.where(is_open, self._share / self._per_unit, 0.0))
        mean = float((np.diff(reach, prepend=0.0) * self._expected()).sum() / reach[-1])
        number = done + np.arange(max(1, int(np.ceil(need / mean))))
        draws = mixed(mixed(self._random_key, self._step), number).astype(np.float64) / 2**64
        classes = np.searchsorted(reach, draws * reach[-1], side="right")
        classes = np.minimum(classes, np.flatnonzero(is_open)[-1])
        return classes[occurrence(classes) < left[classes]]

    def _commit(self, classes: np.ndarray, table: UnitTable, goal: int) -> StepPlan:
        """Cut the units drawn to the size of an update and move the state past them."""
        total = np.cumsum(self._amount(table))
        last = min(int(np.searchsorted(total, goal)), len(table) - 1)
        classes, table = classes[: last + 1], table.take(slice(last + 1))
        over = int(total[last]) - goal
        before = self._place.copy()
        self._place.advance(classes)
        if self._cfg.global_samples and over > 0:
            owner = classes[last]
            first = not (classes[:last] == owner).any()
            table.count[last] -= over
            self._place.taken[owner] -= 1
            used = before.offset[owner] if first else 0
            self._place.offset[owner] = used + table.count[last]
        if self._cfg.global_tokens:
            self._carry = -over
        self._settle(self._credit, classes, table.count)
        self._step += 1
        return StepPlan(table, self._costs, in_turn=self._cfg.policy is Policy.random)

    def _identity(self) -> dict[str, str]:
        """Return what the meaning of the state depends on, in words."""
        order = sorted(range(len(self.cells)), key=lambda number: self.cells[number].name)
        cells = [f"{self.cells[n].name} {self.cells[n].count}" for n in order]
        sizes = [f"{self.cells[n].name} {self.unit_sizes[n]}" for n in order]
        parts = [f"{self.shares[n]:.8f}" for n in order]
        samples = sum(cell.count for cell in self.cells)
        return {
            "cells": f"{len(cells)} with {samples} samples ({_hash(cells)})",
            "batches": f"up to {max(self.unit_sizes)} ({_hash(sizes)})",
            "policy": str(self._cfg.policy),
            "shares": _hash(parts),
            "seed": str(self._seed),
            "shuffle": str(self._cfg.shuffle),
        }


def _hash(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:10]


def _joined(tables: list[UnitTable]) -> UnitTable:
    first = tables[0]
    for table in tables[1:]:
        first = first.join(table)
    return first

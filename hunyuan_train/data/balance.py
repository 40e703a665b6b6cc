"""The work of one update and how it is shared out: which rank does which unit, in which round.

All ranks do one unit of a round at the same time and, where parameters are gathered unit by unit
of the model, wait for each other in every round. So a round should hold units of equal cost, and
the costs of a rank should add up to the same over the rounds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np


@dataclass(frozen=True, slots=True)
class Unit:
    """Up to a batch of samples of one cell: one micro-batch on one rank."""

    cell: int
    """Number of the cell in the list that the planner was given."""
    epoch: int
    """Epoch of the cell's class."""
    start: int
    """First place in the cell's order of that epoch, which has count x repeat places."""
    count: int
    """Samples."""
    weight: float
    """1.0, or 0.0 for a filler that is computed but not counted, to keep ranks in step."""


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly the predicted cost of a step lies on the ranks; 1.0 is even."""

    step: float
    """Average over largest cost of a rank, summed over the rounds."""
    lockstep: float
    """Cost of all units over what the ranks could do while each round waits for its costliest."""


@dataclass(frozen=True, slots=True)
class UnitTable:
    """Units as columns, int64 [n], in the order they were drawn."""

    cell: np.ndarray
    epoch: np.ndarray
    start: np.ndarray
    count: np.ndarray

    def __len__(self) -> int:
        """Return the number of units."""
        return len(self.cell)

    def unit(self, index: int, weight: float = 1.0) -> Unit:
        """Return one row."""
        return Unit(
            int(self.cell[index]),
            int(self.epoch[index]),
            int(self.start[index]),
            int(self.count[index]),
            weight,
        )

    def take(self, index: np.ndarray | slice) -> "UnitTable":
        """Return the rows of ``index``."""
        return UnitTable(self.cell[index], self.epoch[index], self.start[index], self.count[index])

    def join(self, other: "UnitTable") -> "UnitTable":
        """Return these rows, then those."""
        return UnitTable(
            np.concatenate([self.cell, other.cell]),
            np.concatenate([self.epoch, other.epoch]),
            np.concatenate([self.start, other.start]),
            np.concatenate([self.count, other.count]),
        )


class Assignment(Sequence[list[Unit]]):
    """The rounds of every rank: ``assignment[rank]`` is its list of units, made when asked for."""

    def __init__(self, table: UnitTable, weight: np.ndarray, ranks: np.ndarray) -> None:
        """Take units, their weights and ``ranks`` int64 [rank, round], rows of the table."""
        self._table = table
        self._weight = weight
        self._ranks = ranks

    def __len__(self) -> int:
        """Return the number of ranks."""
        return len(self._ranks)

    @overload
    def __getitem__(self, index: int) -> list[Unit]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Unit]]: ...
    def __getitem__(self, index: int | slice) -> list[Unit] | list[list[Unit]]:
        """Return the units of one rank, one per round."""
        if isinstance(index, slice):
            return [self._rounds(rows) for rows in self._ranks[index]]
        return self._rounds(self._ranks[index])

    def __iter__(self) -> Iterator[list[Unit]]:
        """Go through the ranks."""
        return (self._rounds(rows) for rows in self._ranks)

    def _rounds(self, rows: np.ndarray) -> list[Unit]:
        return [self._table.unit(row, float(self._weight[row])) for row in rows.tolist()]


class StepPlan:
    """The units of one update; the same whatever the number of ranks.

    Args:
        table: The units, in the order drawn.
        costs: Cost of one sample of each cell, float64 [cells].
        in_turn: Deal the units to the ranks in the order drawn instead of by cost.
    """

    def __init__(self, table: UnitTable, costs: np.ndarray, in_turn: bool = False) -> None:
        self.table = table
        self._costs = costs
        self._in_turn = in_turn
        self._done: dict[int, tuple[Assignment, Balance]] = {}

    @property
    def units(self) -> list[Unit]:
        """The units, in the order drawn."""
        return [self.table.unit(index) for index in range(len(self.table))]

    @property
    def samples(self) -> int:
        """Samples of the update."""
        return int(self.table.count.sum())

    def assign(self, ranks: int) -> Assignment:
        """Share the units out: ``[rank][round]``, the same number of rounds for every rank.

        If they do not divide, the costliest units are split, and where there is nothing to split,
        fillers of weight 0 take the empty places. Every sample of the step is on one rank, once.
        """
        return self._shared_out(ranks)[0]

    def balance(self, ranks: int) -> Balance:
        """Return how even ``assign(ranks)`` is."""
        return self._shared_out(ranks)[1]

    def _shared_out(self, ranks: int) -> tuple[Assignment, Balance]:
        if ranks not in self._done:
            table, weight = _fit(self.table, self._costs, ranks)
            cost = self._costs[table.cell] * table.count
            rounds = len(table) // ranks
            if self._in_turn:
                rows = np.arange(len(table)).reshape(rounds, ranks).T
            else:
                rows = _by_cost(cost, ranks)
            self._done[ranks] = Assignment(table, weight, rows), _balance(cost[rows], weight[rows])
        return self._done[ranks]


def _fit(table: UnitTable, costs: np.ndarray, ranks: int) -> tuple[UnitTable, np.ndarray]:
    """Split units and add fillers until their number divides by ``ranks``; also the weights."""
    assert len(table), "a step without units"
    while missing := -len(table) % ranks:
        splittable = np.flatnonzero(table.count > 1)
        if not len(splittable):
            break
        cost = costs[table.cell[splittable]] * table.count[splittable]
        chosen = splittable[np.argsort(-cost, kind="stable")[:missing]]
        second = table.take(chosen)
        kept = (second.count + 1) // 2
        count = table.count.copy()
        count[chosen] = kept
        table = UnitTable(table.cell, table.epoch, table.start, count).join(
            UnitTable(second.cell, second.epoch, second.start + kept, second.count - kept)
        )
    weight = np.ones(len(table) + missing)
    if missing:
        weight[len(table) :] = 0.0
        filler = table.take(np.full(missing, np.argmin(costs[table.cell])))
        filler.count[:] = 1
        table = table.join(filler)
    return table, weight


def _by_cost(cost: np.ndarray, ranks: int) -> np.ndarray:
    """Return the rows of each rank, int64 [rank, round]: rounds of like cost, even sums.

    In every round the heaviest units go to the ranks with the least so far. Exchanging units
    afterwards adds less than 0.0001 to the balance of the drawn steps, so nothing is exchanged.
    """
    order = np.argsort(-cost, kind="stable").reshape(-1, ranks)
    rows = np.empty_like(order)
    load = np.zeros(ranks)
    for number, chunk in enumerate(order):
        places = np.argsort(load, kind="stable")
        rows[number, places] = chunk
        load[places] += cost[chunk]
    return rows.T


def _balance(cost: np.ndarray, weight: np.ndarray) -> Balance:
    """Return the balance of ``cost`` [rank, round]; fillers take time but do no work."""
    work = (cost * weight).sum()
    return Balance(
        step=float(work / (len(cost) * cost.sum(1).max())),
        lockstep=float(work / (len(cost) * cost.max(0).sum())),
    )

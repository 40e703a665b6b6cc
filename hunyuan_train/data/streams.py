"""Endless streams of units, one per class, evaluated at any place without storing an order.

A class is the cells of one source, concept, anchor and duration. In a class epoch each sample of
its cells occurs exactly ``repeat`` times: the passes over a cell, each in its own keyed order, are
cut into units one after the other, and the units of all cells follow in a keyed order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from hunyuan_train.data.balance import UnitTable
from hunyuan_train.data.mixture import Cell
from hunyuan_train.data.permute import mixed, permute, text_key

ENDLESS = 2**62


def class_name(cell: Cell) -> str:
    """Name the class of a cell; names of sources and concepts may contain any visible sign."""
    return "\x1f".join([cell.source, cell.concept, f"{cell.bucket.frames}@{cell.anchor}"])


def unit_sizes(
    cells: Sequence[Cell],
    costs: Sequence[float],
    batches: Sequence[int],
    shares: Sequence[float],
) -> list[int]:
    """Return the samples of a unit of each cell, so that all units cost about the same.

    What a unit may cost is what the smallest full batch of a cell with a share costs. The size of a
    class is that over the mean cost of its samples, at least one; its cells deviate from it by
    their aspect ratio.
    """
    columns = zip(batches, costs, shares, strict=True)
    goal = min(batch * cost for batch, cost, share in columns if share > 0)
    members: dict[str, list[int]] = {}
    for number, cell in enumerate(cells):
        members.setdefault(class_name(cell), []).append(number)
    sizes = [1] * len(cells)
    for numbers in members.values():
        draws = sum(cells[number].draws for number in numbers)
        mean = math.fsum(cells[number].draws * costs[number] for number in numbers) / draws
        target = mean * max(1, round(goal / mean))
        for number in numbers:
            sizes[number] = min(max(1, round(target / costs[number])), batches[number])
    return sizes


@dataclass(slots=True)
class Place:
    """How far each class has been read."""

    taken: np.ndarray
    """int64 [classes]: whole units, over all epochs."""
    offset: np.ndarray
    """int64 [classes]: samples of the next unit that were taken already."""

    def copy(self) -> Self:
        """Return an independent copy."""
        return type(self)(self.taken.copy(), self.offset.copy())

    def advance(self, classes: np.ndarray) -> None:
        """Go past one unit for every entry of ``classes``."""
        self.taken += np.bincount(classes, minlength=len(self.taken))
        self.offset[classes] = 0


class Streams:
    """The classes of some cells, sorted by name, and their units.

    Args:
        cells: What is drawn from; units name them by their number here.
        sizes: Samples of a unit of each cell.
        seed: Run seed.
        shuffle: Keyed orders; off, everything comes in the order of the index.
        epochs: Epochs after which a source's classes end, by source; 0 or absent: never.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        sizes: Sequence[int],
        seed: int,
        shuffle: bool,
        epochs: dict[str, int],
    ) -> None:
        names = [class_name(cell) for cell in cells]
        order = sorted(range(len(cells)), key=lambda n: (names[n], cells[n].first, cells[n].name))
        self.names = sorted(set(names))
        numbers = {name: number for number, name in enumerate(self.names)}
        self._cell = np.array(order, np.int64)
        self._size = np.array([sizes[n] for n in order], np.int64)
        self._draws = np.array([cells[n].draws for n in order], np.int64)
        in_cell = -(-self._draws // self._size)
        owner = self._owner = np.array([numbers[names[n]] for n in order], np.int64)
        self._ends = np.cumsum(in_cell)
        self._begins = self._ends - in_cell
        classes = len(self.names)
        self.units = np.zeros(classes, np.int64)
        np.add.at(self.units, owner, in_cell)
        self.samples = np.zeros(classes, np.int64)
        np.add.at(self.samples, owner, self._draws)
        self._base = np.cumsum(self.units) - self.units
        sources = {name: cell.source for name, cell in zip(names, cells, strict=True)}
        self.source = [sources[name] for name in self.names]
        limits = [epochs.get(source, 0) for source in self.source]
        self.limit = np.where(limits, np.array(limits) * self.units, ENDLESS).astype(np.int64)
        self._key = np.array([text_key(seed, "unit order", n) for n in self.names], np.uint64)
        self._shuffle = shuffle

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of a number per cell over each class; float64 [classes]."""
        return np.bincount(self._owner, values[self._cell], len(self.names))

    def weighted_cost(self, costs: np.ndarray) -> np.ndarray:
        """Return the mean cost of each class's units, weighted by cost; float64 [classes].

        The weight makes it the cost of a full unit where there are enough samples for them.
        """
        full, rest = np.divmod(self._draws, self._size)
        cost = costs[self._cell]
        square = cost**2 * (full * self._size**2 + rest**2)
        plain = cost * self._draws
        classes = len(self.names)
        return np.bincount(self._owner, square, classes) / np.bincount(self._owner, plain, classes)

    def start(self) -> Place:
        """Return the beginning of all streams."""
        return Place(np.zeros(len(self.names), np.int64), np.zeros(len(self.names), np.int64))

    def draw(self, classes: np.ndarray, place: Place) -> UnitTable:
        """Return the next unit of each entry of ``classes``, int64 [n], from ``place`` on."""
        turn = occurrence(classes)
        number = place.taken[classes] + turn
        total = self.units[classes]
        epoch, position = np.divmod(number, total)
        if self._shuffle:
            position = permute(position, total, mixed(self._key[classes], epoch))
        position += self._base[classes]
        row = np.searchsorted(self._ends, position, side="right")
        size = self._size[row]
        start = (position - self._begins[row]) * size
        count = np.minimum(size, self._draws[row] - start)
        used = np.where(turn == 0, place.offset[classes], 0)
        return UnitTable(self._cell[row], epoch, start + used, count - used)


def occurrence(classes: np.ndarray) -> np.ndarray:
    """Return how often each entry occurred before, int64 [n]."""
    order = np.argsort(classes, kind="stable")
    ordered = classes[order]
    place = np.arange(len(classes))
    begins = np.flatnonzero(np.diff(ordered, prepend=-1))
    turn = np.empty_like(place)
    turn[order] = place - np.repeat(begins, np.diff(begins, append=len(classes)))
    return turn

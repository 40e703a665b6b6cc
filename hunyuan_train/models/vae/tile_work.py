"""Who runs the tiles of a video, and how many at once; the results are the same."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Network: TypeAlias = Callable[[Tensor], Tensor]
"""Encoder or decoder of one tile, [B, C, T, H, W] to [B, C', T', H', W']."""


class TileSpread(Protocol):
    """Ranks that share the tiles of one video; all of them make the same calls."""

    @property
    def rank(self) -> int:
        """This rank's number among those that share."""
        ...

    @property
    def size(self) -> int:
        """How many share."""
        ...

    def gather(self, mine: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor]:
        """Return all tiles, on every rank.

        Args:
            mine: The tiles of this rank, in their order among all.
            owners: Per tile the rank that has it.
        """
        ...


@dataclass(slots=True)
class TileWork:
    """How the tiles of a video are run."""

    batch: int = 1
    """Tiles of one shape that go through the network together."""

    spread: TileSpread | None = None
    """The ranks that share the tiles; None runs all of them here."""

    @property
    def width(self) -> int:
        """Tiles that can be under way at once."""
        return self.batch * (1 if self.spread is None else self.spread.size)

    def run(self, network: Network, tiles: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the network's result for every tile, in order."""
        if self.spread is None:
            yield from self._here(network, tiles)
            return
        owners = deal([tile.numel() for tile in tiles], self.spread.size)
        mine = [
            tile for tile, owner in zip(tiles, owners, strict=True) if owner == self.spread.rank
        ]
        yield from self.spread.gather(list(self._here(network, mine)), owners)

    def _here(self, network: Network, tiles: Sequence[Tensor]) -> Iterator[Tensor]:
        ready: dict[int, Tensor] = {}
        for index, tile in enumerate(tiles):
            if index not in ready:
                later = range(index, len(tiles))
                alike = [i for i in later if i not in ready and tiles[i].shape == tile.shape]
                alike = alike[: self.batch]
                if len(alike) == 1:
                    ready[index] = network(tile)
                else:
                    together = network(torch.cat([tiles[i] for i in alike]))
                    ready.update(zip(alike, together.split(tile.shape[0]), strict=True))
            yield ready.pop(index)


def deal(costs: Sequence[int], ranks: int) -> list[int]:
    """Return a rank for every cost: the dearest first, each to the rank with the least so far."""
    owners, loads = [0] * len(costs), [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners

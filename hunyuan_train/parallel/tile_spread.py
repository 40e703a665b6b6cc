"""Ranks that share the tiles of one video; the VAE knows only ``TileSpread``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hunyuan_train.parallel.mesh import Axes


@dataclass(frozen=True, slots=True)
class RankSpread:
    """A process group whose ranks each run some of the tiles and then have all of them."""

    group: dist.ProcessGroup
    device: torch.device

    @property
    def rank(self) -> int:
        """This rank's number in the group."""
        return self.group.rank()

    @property
    def size(self) -> int:
        """Ranks in the group."""
        return self.group.size()

    def gather(self, mine: Sequence[Tensor], owners: Sequence[int]) -> list[Tensor]:
        """Return all tiles, in order; see ``TileSpread``.

        Tiles at the border are smaller than others, so each rank sends its own in one piece after
        the shapes are known.
        """
        kinds: list[Any] = [None] * self.size
        dist.all_gather_object(kinds, [(tile.shape, tile.dtype) for tile in mine], group=self.group)
        parts = [self._from(rank, kinds[rank], mine) for rank in range(self.size)]
        return [parts[rank].pop(0) for rank in owners]

    def _from(
        self, rank: int, kinds: list[tuple[torch.Size, torch.dtype]], mine: Sequence[Tensor]
    ) -> list[Tensor]:
        if not kinds:
            return []
        sizes = [shape.numel() for shape, _ in kinds]
        if rank == self.rank:
            flat = torch.cat([tile.reshape(-1) for tile in mine])
        else:
            flat = torch.empty(sum(sizes), dtype=kinds[0][1], device=self.device)
        dist.broadcast(flat, dist.get_global_rank(self.group, rank), group=self.group)
        return [part.view(kind[0]) for part, kind in zip(flat.split(sizes), kinds, strict=True)]


def tile_spread(axes: Axes, device: torch.device) -> RankSpread | None:
    """Return the ranks that work on one batch, None where that is this rank alone."""
    return RankSpread(axes.group("model"), device) if axes.size("model") > 1 else None

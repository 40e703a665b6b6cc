"""Which run of a clip each rank has when the autoencoder is split, at every resolution.

Ranks own whole latent positions, and of every finer resolution what belongs to them. A latent row
is 8 pixel rows. Latent frame 0 is pixel frame 0, and latent frame ``a`` above is the pixel frames
``4a-3`` to ``4a``: these are the last ones its convolutions read. So 9 frames, 3 latent ones, on
two ranks:

| rank | latent frames | at half the frames | pixel frames |
|---|---|---|---|
| 0 | 0 1 | 0 1 2 | 0 1 2 3 4 |
| 1 | 2 | 3 4 | 5 6 7 8 |
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from hunyuan_train.models.vae.config import KINDS, TEMPORAL_RATIO, VAE_884
from hunyuan_train.parallel.config import VaeSplit

SPATIAL_RATIO = KINDS[VAE_884].spatial_ratio


class Border(NamedTuple):
    """What a convolution on one rank reads beyond the rank's own run."""

    before: int
    """Positions in front of the run, copies of the clip's edge included."""
    after: int
    """Positions behind it."""
    fetched: tuple[tuple[int, int, int], ...]
    """(rank, first, last + 1): what others have of it, counted from the start of the own run, so
    that positions in front are negative; in order of rank."""
    lent: tuple[tuple[int, int, int], ...]
    """(rank, first, last + 1): what others read of the own run, from its start; same order."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How the latent positions of one clip are divided over ranks."""

    dim: VaeSplit
    counts: tuple[int, ...]
    """Latent frames or latent rows of each rank, in rank order; none is 0."""

    @classmethod
    def of(cls, dim: VaeSplit, latents: int, ranks: int) -> "Parts":
        """Divide ``latents`` positions as evenly as possible; earlier ranks get the surplus.

        Raises:
            ValueError: a rank would get nothing.
        """
        if latents < ranks:
            raise ValueError(_too_small(dim, latents, ranks))
        share, surplus = divmod(latents, ranks)
        return cls(dim, tuple(share + (rank < surplus) for rank in range(ranks)))

    @property
    def ratio(self) -> int:
        """Pixel positions to a latent one."""
        return TEMPORAL_RATIO if self.dim is VaeSplit.frames else SPATIAL_RATIO

    def run(self, rank: int, scale: int) -> range:
        """Return the positions of a rank where ``scale`` positions belong to a latent one."""
        ends = [0, *accumulate(self.counts)]
        return range(self._start(ends[rank], scale), self._start(ends[rank + 1], scale))

    def total(self, scale: int) -> int:
        """Return the positions of the clip where ``scale`` of them belong to a latent one."""
        return self._start(sum(self.counts), scale)

    def _start(self, latent: int, scale: int) -> int:
        if self.dim is VaeSplit.height or latent == 0:
            return scale * latent
        return scale * (latent - 1) + 1


@lru_cache(maxsize=1024)
def border(
    parts: Parts, rank: int, scale: int, stride: int, pads: tuple[int, int]
) -> tuple[Border, range]:
    """Return what a convolution reads around a rank's run, and which of it exists in the clip.

    Args:
        parts: the division of the clip.
        rank: whose run.
        scale: positions to a latent one in the input of the convolution.
        stride: of the convolution along the divided direction.
        pads: positions in front of and behind the clip that the convolution reads.

    Returns:
        The border, and the positions that are not copies of the clip's edge, own ones included,
        counted from the start of the own run.
    """
    own, ranks = parts.run(rank, scale), range(len(parts.counts))
    reads = [_reads(parts, other, scale, stride, pads) for other in ranks]
    fetched = [(r, _shared(reads[rank], parts.run(r, scale))) for r in ranks if r != rank]
    lent = [(r, _shared(reads[r], own)) for r in ranks if r != rank]
    mine = reads[rank]
    found = Border(
        own.start - mine.start,
        mine.stop - own.stop,
        *(
            tuple((r, run.start - own.start, run.stop - own.start) for r, run in runs if run)
            for runs in (fetched, lent)
        ),
    )
    real = _shared(mine, range(parts.total(scale)))
    return found, range(real.start - own.start, real.stop - own.start)


def _reads(parts: Parts, rank: int, scale: int, stride: int, pads: tuple[int, int]) -> range:
    # Output j reads the inputs from stride * j - front to stride * j + back.
    own, made = parts.run(rank, scale), parts.run(rank, scale // stride)
    front, back = pads
    last = max(own.stop, stride * (made.stop - 1) + back + 1)
    return range(min(own.start, stride * made.start - front), last)


def _shared(one: range, other: range) -> range:
    return range(max(one.start, other.start), min(one.stop, other.stop))


def _too_small(dim: VaeSplit, latents: int, ranks: int) -> str:
    if dim is VaeSplit.frames:
        size, least = TEMPORAL_RATIO * (latents - 1) + 1, TEMPORAL_RATIO * (ranks - 1) + 1
        clip, other = f"{size} frames", VaeSplit.height
        fits = f"at least {least} frames"
    else:
        clip, other = f"a height of {SPATIAL_RATIO * latents} px", VaeSplit.frames
        fits = f"at least {SPATIAL_RATIO * ranks} px"
    return (
        f"parallel.vae_split={dim.value} over {ranks} ranks leaves some of them nothing of a clip "
        f"of {clip}, which has {latents} latent {'frames' if dim is VaeSplit.frames else 'rows'}; "
        f"use {fits}, at most {latents} ranks, or parallel.vae_split={other.value}"
    )

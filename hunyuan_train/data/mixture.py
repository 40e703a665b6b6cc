"""What is drawn from: cells of equal samples, and the share of each in the samples drawn."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.store import RowStore

_SWEEPS = 5000
_CLOSE = 1e-6
"""Relative error with which shares meet what was asked."""
_FAR = 1e-3
"""The same where they can only be met by leaving something out, which is approached slowly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """Rows of one store with equal concept, bucket, anchor and repeat; of one cost."""

    name: str
    """``source/concept/17x256x256@256x1``: source, concept, bucket, anchor, repeat."""
    store: int
    """Number of the store in the list that ``cells_of`` was given."""
    first: int
    """Row of the store's index where the cell begins."""
    count: int
    """Rows."""
    repeat: int
    """Times that each row is drawn in an epoch."""
    bucket: Bucket
    anchor: int
    concept: str
    source: str
    """Key of ``data.sources``."""

    @property
    def media(self) -> str:
        """``image`` for one frame, else ``video``."""
        return self.bucket.media

    @property
    def draws(self) -> int:
        """Samples drawn in an epoch."""
        return self.count * self.repeat


def cells_of(stores: Sequence[RowStore], cfg: DataConfig) -> list[Cell]:
    """Return the cells that ``data.train_anchors`` and ``data.train_durations`` select, by name.

    Raises:
        ValueError: Nothing is selected; the message lists what the stores have.
    """
    cells = [
        Cell(
            name=f"{store.name}/{group.concept}/{group.bucket}@{group.anchor}x{group.repeat}",
            store=number,
            first=group.first,
            count=group.count,
            repeat=group.repeat,
            bucket=group.bucket,
            anchor=group.anchor,
            concept=group.concept,
            source=store.name,
        )
        for number, store in enumerate(stores)
        for group in store.index.groups
        if group.count
    ]
    selected = [
        cell
        for cell in cells
        if (not cfg.train_anchors or cell.anchor in cfg.train_anchors)
        and (not cfg.train_durations or cell.bucket.frames in cfg.train_durations)
    ]
    if not selected:
        have: Counter[tuple[int, Bucket]] = Counter()
        for cell in cells:
            have[cell.anchor, cell.bucket] += cell.count
        names = [f"anchor {anchor}: {bucket} ({have[anchor, bucket]})" for anchor, bucket in have]
        raise ValueError(
            f"no usable sample: data.train_anchors={cfg.train_anchors} and "
            f"data.train_durations={cfg.train_durations} select none of the {have.total()} "
            f"samples; there is {_listed(sorted(names)) or 'no bucket at all'}. Change the "
            "selection, or precompute with such data.anchors and data.durations"
        )
    return sorted(selected, key=lambda cell: cell.name)


def shares(cells: Sequence[Cell], cfg: DataConfig) -> np.ndarray:
    """Return the share of every cell in the samples drawn, float64 [cells], of sum 1.

    Natural shares follow the samples times their repeat. They are scaled until the sums over
    sources, media, anchors and concepts are what the config asks for (iterative proportional
    fitting), which keeps all other proportions. Values that a setting does not name keep what its
    shares leave to 1, in natural proportions.

    Raises:
        ValueError: A share is asked of something without samples, or the shares exclude each other.
    """
    order = sorted(range(len(cells)), key=lambda number: cells[number].name)
    result = np.empty(len(cells))
    result[order] = _raked([cells[number] for number in order], cfg)
    return result


def _raked(cells: Sequence[Cell], cfg: DataConfig) -> np.ndarray:
    natural = np.array([cell.draws for cell in cells], np.float64)
    natural /= natural.sum()
    margins = [
        margin
        for field, values, asked in _asked(cells, cfg)
        if (margin := _margin(field, values, asked, natural))
    ]
    if not margins:
        return natural
    members = np.stack([margin.member for margin in margins])
    kinds, kind = np.unique(members, axis=1, return_inverse=True)
    weights = np.bincount(kind.ravel(), natural)
    return natural * (_fitted(weights, kinds, margins) / weights)[kind.ravel()]


def _fitted(weights: np.ndarray, kinds: np.ndarray, margins: list["_Margin"]) -> np.ndarray:
    """Scale ``weights`` [kinds] until the sums over every margin's values are its target.

    ``kinds`` int64 [margins, kinds] has the number of the value of each margin.
    """
    found = weights.copy()
    error, worst = 0.0, ""
    for _ in range(_SWEEPS):
        error, worst = 0.0, ""
        for margin, member in zip(margins, kinds, strict=True):
            sums = np.bincount(member, found, len(margin.target))
            off = np.abs(sums - margin.target) / np.maximum(margin.target, 1e-12)
            if off.max() > error:
                error, value = float(off.max()), int(off.argmax())
                worst = (
                    f"{margin.field} asks {margin.target[value]:.3g} for {margin.names[value]!r} "
                    f"and the others allow {sums[value]:.3g}"
                )
            ratio = np.divide(margin.target, sums, out=np.zeros_like(sums), where=sums > 0)
            found *= ratio[member]
        if error < _CLOSE:
            break
    if error > _FAR:
        raise ValueError(
            f"the shares asked of the data exclude each other ({worst}); loosen one of "
            f"{', '.join(margin.field for margin in margins)}"
        )
    return found / found.sum()


@dataclass(frozen=True, slots=True)
class _Margin:
    """Shares asked of the values of one attribute."""

    field: str
    names: list[str]
    member: np.ndarray
    """Number of its value, for every cell."""
    target: np.ndarray


def _asked(
    cells: Sequence[Cell], cfg: DataConfig
) -> list[tuple[str, list[str], Mapping[str, float]]]:
    """Return (field of the config, value of every cell, shares asked) of the four attributes."""
    weights = {name: source.weight for name, source in cfg.sources.items()}
    if any(weights.values()) and (zero := [name for name in weights if not weights[name]]):
        raise ValueError(
            f"data.sources.{min(zero)}.weight is 0 while other sources have a weight; give it one "
            "or remove the source"
        )
    total = sum(weights[name] for name in sorted(weights))
    fractions = {name: weight / total for name, weight in weights.items()} if total else {}
    anchors = {str(anchor): share for anchor, share in cfg.anchor_shares.items()}
    return [
        ("data.sources weights", [cell.source for cell in cells], fractions),
        ("data.media_shares", [cell.media for cell in cells], cfg.media_shares),
        ("data.anchor_shares", [str(cell.anchor) for cell in cells], anchors),
        ("data.concept_shares", [cell.concept for cell in cells], cfg.concept_shares),
    ]


def _margin(
    field: str, values: list[str], asked: Mapping[str, float], natural: np.ndarray
) -> _Margin | None:
    """Return the shares of every value that occurs, None if none is asked for."""
    if not asked:
        return None
    asked = {str(name): float(share) for name, share in asked.items()}
    names, member = np.unique(values, return_inverse=True)
    listed = names.tolist()
    for name, share in sorted(asked.items()):
        if share and name not in listed:
            raise ValueError(
                f"{field} asks {share:g} of {name!r}, but no selected sample is of it; there is "
                f"{_listed(listed)}"
            )
    total = sum(asked[name] for name in sorted(asked))
    target = np.array([asked.get(name, 0.0) for name in listed])
    free = np.array([name not in asked for name in listed])
    if free.any() and total < 1 - _CLOSE:
        rest = np.where(free, np.bincount(member, natural, len(listed)), 0.0)
        target += rest / rest.sum() * (1 - total)
    elif free.any() and total > 1 + _CLOSE:
        raise ValueError(
            f"{field} add up to {total:g} and leave nothing for "
            f"{_listed([name for name in listed if name not in asked])}; name every value, or keep "
            "the sum at 1 or below"
        )
    return _Margin(field, listed, member, target / target.sum())


def _listed(names: list[str], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

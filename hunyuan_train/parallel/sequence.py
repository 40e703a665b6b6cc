"""Both token streams in shards along their own sequence, padded where they do not divide.

With C context-parallel ranks and T sequence-parallel ones inside tensor parallelism, image tokens
are cut into C * T runs in the order (cp, tp) and text tokens in the order (tp, cp), because the
text refiner runs on the T shards before context parallelism cuts them. Attention over all keys does
not care about the order; ``rows`` tells it where each row belongs.
"""

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from hunyuan_train.models.rope import Rope
from hunyuan_train.models.shapes import Patches, TextMask, TxtTokens
from hunyuan_train.models.tokens import Rows
from hunyuan_train.parallel.collectives import gather_rows_of_whole
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.parallel.ring import ChunkMasks

MAX_CACHED_SHAPES = 16


class Order(NamedTuple):
    """Where the rows of attention belong in the joint sequence."""

    mine: Tensor
    """Position of this rank's rows, [s] int64, 0 for padding."""
    keep: tuple[Tensor | None, ...]
    """Per ring rank, the rows of its chunk that are not padding, [s'] int64; None for all."""
    text: tuple[Tensor, ...]
    """Per ring rank, the text token each of those rows is, [s'] int64; negative for an image's."""


class ShardedTokens:
    """The token layout of one rank; see ``models.tokens.TokenLayout``."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes
        self._ring, self._ulysses = axes.size("cp_ring"), axes.size("cp_ulysses")
        self._cp = self._ring * self._ulysses
        self._tp = axes.size("tp") if axes.sequence_parallel else 1
        self._cp_rank = axes.rank("cp")
        self._tp_rank = axes.rank("tp") if axes.sequence_parallel else 0
        self._orders: OrderedDict[tuple[object, ...], tuple[Order, Order]] = OrderedDict()

    @property
    def shards(self) -> int:
        """Runs each stream is cut into."""
        return self._cp * self._tp

    def shard_img(self, patches: Patches) -> Patches:
        """Return this rank's run of image tokens, padded with zeros."""
        run = self._run(patches.shape[1])
        start = (self._cp_rank * self._tp + self._tp_rank) * run
        return _padded(patches, self.shards * run)[:, start : start + run]

    def enter_refiner(
        self, txt: TxtTokens, text_mask: TextMask | None
    ) -> tuple[TxtTokens, TextMask | None]:
        """Return this rank's tensor-parallel share of the text; the mask covers all of it."""
        if self._tp == 1:
            return txt, text_mask
        batch, tokens = txt.shape[:2]
        padded = self.shards * self._run(tokens)
        share = padded // self._tp
        start = self._tp_rank * share
        if padded > tokens:
            if text_mask is None:
                text_mask = torch.ones(batch, tokens, dtype=torch.bool, device=txt.device)
            text_mask = _padded(text_mask, padded)
        return _padded(txt, padded)[:, start : start + share], text_mask

    def shard_txt(self, txt: TxtTokens, txt_tokens: int) -> TxtTokens:
        """Return this rank's context-parallel run of what the refiner left here."""
        run = self._run(txt_tokens)
        start = self._cp_rank * run
        return _padded(txt, self._cp * run)[:, start : start + run]

    def rows(
        self, rope: Rope, text_mask: TextMask | None, img_tokens: int, txt_tokens: int
    ) -> tuple[Rows, Rows]:
        """Describe the rows of the two kinds of block; tensor-parallel shards are gathered."""
        apart, joined = self._cached_orders(img_tokens, txt_tokens, rope.cos.device)
        return tuple(  # pyright: ignore[reportReturnType]
            Rows(Rope(rope.cos[order.mine], rope.sin[order.mine]), _chunk_masks(order, text_mask))
            for order in (apart, joined)
        )

    def gather_img(self, patches: Patches, img_tokens: int) -> Patches:
        """Return all image tokens on every rank."""
        if self.shards == 1:
            return patches
        whole = gather_rows_of_whole(patches, self._axes.group(self._axes.sequence_axis))
        return whole[:, :img_tokens]

    def _run(self, tokens: int) -> int:
        return -(-tokens // self.shards)

    def _cached_orders(
        self, img_tokens: int, txt_tokens: int, device: torch.device
    ) -> tuple[Order, Order]:
        key = (img_tokens, txt_tokens, device)
        if key not in self._orders:
            img = self._positions(img_tokens, 0).view(self._cp, self._tp, -1)
            txt = self._positions(txt_tokens, img_tokens).view(self._tp, self._cp, -1)
            txt = txt.transpose(0, 1)  # [cp, tp, l]
            apart = torch.cat([img.flatten(1), txt.flatten(1)], dim=1)  # [cp, rows]
            joined = torch.cat([img, txt], dim=2).flatten(1)
            self._orders[key] = (
                self._order(apart, img_tokens, device),
                self._order(joined, img_tokens, device),
            )
            if len(self._orders) > MAX_CACHED_SHAPES:
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]

    def _order(self, by_cp: Tensor, img_tokens: int, device: torch.device) -> Order:
        keep, text = [], []
        for positions in by_cp.view(self._ring, -1):
            real = positions >= 0
            keep.append(None if real.all() else torch.nonzero(real)[:, 0].to(device))
            text.append((positions[real] - img_tokens).to(device))
        mine = by_cp[self._cp_rank].clamp(min=0).to(device)
        return Order(mine, tuple(keep), tuple(text))

    def _positions(self, tokens: int, first: int) -> Tensor:
        positions = torch.full((self.shards * self._run(tokens),), -1)
        positions[:tokens] = torch.arange(first, first + tokens)
        return positions


def _padded(x: Tensor, rows: int) -> Tensor:
    """Append zero rows on dim 1 up to ``rows``."""
    missing = rows - x.shape[1]
    if not missing:
        return x
    return functional.pad(x, (0, missing) if x.dim() == 2 else (0, 0, 0, missing))


def _chunk_masks(order: Order, text_mask: Tensor | None) -> ChunkMasks | None:
    """Return which keys of each chunk exist: padding is dropped by index, ragged text masked."""
    if text_mask is None:
        if all(rows is None for rows in order.keep):
            return None
        return ChunkMasks(order.keep, (None,) * len(order.keep))
    masks = (text_mask[:, text.clamp(min=0)] | (text < 0) for text in order.text)  # [B, s']
    return ChunkMasks(order.keep, tuple(masks))

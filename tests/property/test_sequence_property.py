"""Token shards of all ranks together: every token once, and every row described as what it is.

No processes: a stand-in for the axes says where a rank is. Image token i has the value i + 1 and
text token j the value N + j + 1, so padding, which is zero, tells itself apart.
"""

import math
from dataclasses import dataclass

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hunyuan_train.models.rope import Rope
from hunyuan_train.models.tokens import Rows
from hunyuan_train.parallel.ring import ChunkMasks
from hunyuan_train.parallel.sequence import MAX_CACHED_SHAPES, ShardedTokens


@dataclass(frozen=True)
class Place:
    """A rank's place, in the words of ``parallel.mesh.Axes``."""

    sizes: dict[str, int]
    ranks: dict[str, int]
    sequence_parallel: bool

    def size(self, axis: str) -> int:
        return self.sizes[axis]

    def rank(self, axis: str) -> int:
        return self.ranks[axis]


@dataclass(frozen=True)
class Problem:
    """Tokens of both streams and how many ranks they are spread over."""

    img: int
    txt: int
    ring: int
    ulysses: int
    tp: int
    sp: bool
    lengths: tuple[int, ...] | None
    """Valid text tokens of each sample, 0 included; None for no mask."""

    @property
    def cp(self) -> int:
        return self.ring * self.ulysses

    @property
    def shares(self) -> int:
        """Sequence shards inside tensor parallelism."""
        return self.tp if self.sp else 1

    @property
    def samples(self) -> int:
        return len(self.lengths) if self.lengths else 2

    def layout(self, cp_rank: int, tp_rank: int) -> ShardedTokens:
        ring, ulysses = divmod(cp_rank, self.ulysses)
        names = ("cp_ring", "cp_ulysses", "cp", "tp")
        sizes = dict(zip(names, (self.ring, self.ulysses, self.cp, self.tp), strict=True))
        ranks = dict(zip(names, (ring, ulysses, cp_rank, tp_rank), strict=True))
        return ShardedTokens(Place(sizes, ranks, self.sp))  # pyright: ignore[reportArgumentType]

    def text_mask(self) -> Tensor | None:
        if self.lengths is None:
            return None
        return torch.arange(self.txt) < torch.tensor(self.lengths)[:, None]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    txt, tp = draw(st.integers(1, 13)), draw(st.integers(1, 4))
    lengths = st.lists(st.integers(0, txt), min_size=1, max_size=3).map(tuple)
    return Problem(
        img=draw(st.integers(1, 40)),
        txt=txt,
        ring=draw(st.integers(1, 4)),
        ulysses=draw(st.integers(1, 4)),
        tp=tp,
        sp=tp > 1 and draw(st.booleans()),
        lengths=draw(st.none() | lengths),
    )


FEW_TOKENS = Problem(1, 2, ring=2, ulysses=2, tp=2, sp=True, lengths=(0, 2))
FEW_WITHOUT_SP = Problem(3, 1, ring=4, ulysses=1, tp=2, sp=False, lengths=None)
EVEN = Problem(32, 8, ring=2, ulysses=2, tp=2, sp=True, lengths=None)


def marked(problem: Problem) -> tuple[Tensor, Tensor]:
    """Return patches [B, N, 1] and text [B, L, 1] that hold their position plus one."""
    values = torch.arange(1, problem.img + problem.txt + 1, dtype=torch.float64)
    whole = values.expand(problem.samples, -1)[..., None]
    return whole[:, : problem.img], whole[:, problem.img :]


def shards(problem: Problem) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
    """Return image and text rows of every rank, by (context rank, tensor rank)."""
    img, txt = marked(problem)
    held = {}
    for cp_rank in range(problem.cp):
        for tp_rank in range(problem.tp):
            tokens = problem.layout(cp_rank, tp_rank)
            share, _ = tokens.enter_refiner(txt, problem.text_mask())
            held[cp_rank, tp_rank] = (
                tokens.shard_img(img),
                tokens.shard_txt(share, problem.txt),
            )
    return held


def real(rows: Tensor) -> list[float]:
    return [value for value in rows.flatten().tolist() if value]


@settings(max_examples=250, deadline=None)
@given(problem=problems())
@example(problem=FEW_TOKENS)
@example(problem=FEW_WITHOUT_SP)
@example(problem=EVEN)
def test_all_shards_together_hold_every_token_once(problem: Problem) -> None:
    held = shards(problem)
    img, txt = marked(problem)
    owners = [key for key in held if problem.sp or key[1] == 0]
    for stream, whole in ((0, img), (1, txt)):
        lengths = {rows[stream].shape[1] for rows in held.values()}
        assert lengths == {math.ceil(whole.shape[1] / (problem.cp * problem.shares))}
        for sample in range(problem.samples):
            found = [v for key in owners for v in real(held[key][stream][sample])]
            assert sorted(found) == whole[sample].flatten().tolist()
    if not problem.sp:  # every tensor-parallel rank has the same rows
        for cp_rank, tp_rank in held:
            for one, other in zip(held[cp_rank, tp_rank], held[cp_rank, 0], strict=True):
                assert torch.equal(one, other)


@settings(max_examples=100, deadline=None)
@given(problem=problems())
@example(problem=FEW_TOKENS)
def test_image_runs_follow_each_other_as_they_are_gathered(problem: Problem) -> None:
    """``gather_img`` concatenates in rank order and cuts: that must give the image back."""
    held = shards(problem)
    order = [(c, t) for c in range(problem.cp) for t in range(problem.shares)]
    gathered = torch.cat([held[key][0] for key in order], dim=1)[:, : problem.img]
    assert torch.equal(gathered, marked(problem)[0])


@settings(max_examples=100, deadline=None)
@given(problem=problems())
@example(problem=FEW_TOKENS)
def test_the_refiner_sees_every_text_token_once_and_no_padding(problem: Problem) -> None:
    _, txt = marked(problem)
    seen, mask = [], None
    for tp_rank in range(problem.shares):
        share, mask = problem.layout(0, tp_rank).enter_refiner(txt, problem.text_mask())
        seen.append(share)
    keys = torch.cat(seen, dim=1)[..., 0]  # the keys of the refiner's attention
    assert torch.equal(keys[:, : problem.txt], txt[..., 0])
    assert not keys[:, problem.txt :].any()
    if mask is None:
        assert keys.shape[1] == problem.txt  # no mask, so nothing may be padding
        return
    valid = problem.text_mask()
    wanted = torch.zeros_like(mask)
    wanted[:, : problem.txt] = True if valid is None else valid
    assert torch.equal(mask, wanted)
    assert mask.shape[1] == keys.shape[1]


def in_attention(problem: Problem, cp_rank: int, apart: bool) -> Tensor:
    """Return the rows [B, s] attention gets on a context rank, as its linears gather them.

    Double blocks gather each stream over tensor parallelism and join them; single blocks join the
    streams on each rank and gather that.
    """
    held = shards(problem)
    img, txt = zip(*(held[cp_rank, t] for t in range(problem.shares)), strict=True)
    parts = (
        [*img, *txt] if apart else [part for pair in zip(img, txt, strict=True) for part in pair]
    )
    return torch.cat(parts, dim=1)[..., 0]


def rows_of(problem: Problem, cp_rank: int, tp_rank: int) -> tuple[Rows, Rows]:
    """Return both descriptions; the rotary table holds positions as cos and as negative sin."""
    positions = torch.arange(problem.img + problem.txt, dtype=torch.float64)[:, None]
    rope = Rope(positions, -positions)
    return problem.layout(cp_rank, tp_rank).rows(
        rope, problem.text_mask(), problem.img, problem.txt
    )


@settings(max_examples=150, deadline=None)
@given(problem=problems())
@example(problem=FEW_TOKENS)
@example(problem=FEW_WITHOUT_SP)
def test_every_row_is_rotated_as_the_token_it_is(problem: Problem) -> None:
    for cp_rank in range(problem.cp):
        for tp_rank in range(problem.tp):
            for rows, apart in zip(rows_of(problem, cp_rank, tp_rank), (True, False), strict=True):
                values = in_attention(problem, cp_rank, apart)[0]
                assert rows.rope.cos.shape == (len(values), 1)
                exists = values > 0
                assert torch.equal(rows.rope.cos[exists, 0] + 1, values[exists])
                assert torch.equal(rows.rope.sin[exists, 0], 1 - values[exists])


@settings(max_examples=150, deadline=None)
@given(problem=problems())
@example(problem=FEW_TOKENS)
@example(problem=FEW_WITHOUT_SP)
@example(problem=EVEN)
def test_masks_leave_out_padding_and_ragged_text_and_nothing_else(problem: Problem) -> None:
    valid = problem.text_mask()
    exists = torch.ones(problem.samples, 1 + problem.img + problem.txt, dtype=torch.bool)
    exists[:, 0] = False  # padding has the value 0
    if valid is not None:
        exists[:, 1 + problem.img :] = valid
    for number, apart in enumerate((True, False)):
        # A chunk of the ring is the rows of its Ulysses ranks in their order.
        chunks = [
            torch.cat(
                [
                    in_attention(problem, r * problem.ulysses + u, apart)
                    for u in range(problem.ulysses)
                ],
                dim=1,
            ).long()
            for r in range(problem.ring)
        ]
        found = {
            (c, t): rows_of(problem, c, t) for c in range(problem.cp) for t in range(problem.tp)
        }
        for place, rows in found.items():
            masks = rows[number].key_mask
            if masks is None:
                assert valid is None
                assert all(bool((chunk > 0).all()) for chunk in chunks)
                continue
            assert isinstance(masks, ChunkMasks)
            for chunk, keep, mask in zip(chunks, masks.keep, masks.masks, strict=True):
                kept = torch.zeros_like(chunk, dtype=torch.bool)
                index = torch.arange(chunk.shape[1]) if keep is None else keep
                kept[:, index] = True if mask is None else mask
                assert torch.equal(kept, exists.gather(1, chunk)), place
                assert not (keep is not None and len(keep) == chunk.shape[1])  # None is cheaper


def test_ragged_text_of_another_batch_is_not_remembered() -> None:
    """Orders are kept per shape; masks are of one batch."""
    problem = Problem(5, 4, ring=2, ulysses=1, tp=1, sp=False, lengths=(4, 2))
    tokens = problem.layout(0, 0)
    rope = Rope(torch.zeros(9, 1), torch.zeros(9, 1))
    counts = []
    for mask in (problem.text_mask(), torch.ones(2, 4, dtype=torch.bool), None):
        masks = tokens.rows(rope, mask, 5, 4)[0].key_mask
        counts.append(None if masks is None else [m is None or int(m.sum()) for m in masks.masks])
    # Chunks are image 0-2 with text 0-1, and image 3-4 with text 2-3 and one row of padding.
    assert counts == [[10, 6], [10, 8], [True, True]]


def test_a_run_of_many_shapes_keeps_the_latest_orders() -> None:
    tokens = Problem(1, 1, ring=2, ulysses=1, tp=1, sp=False, lengths=None).layout(1, 0)
    for img in range(1, MAX_CACHED_SHAPES + 6):
        rope = Rope(torch.zeros(img + 3, 1), torch.zeros(img + 3, 1))
        tokens.rows(rope, None, img, 3)
    assert len(tokens._orders) == MAX_CACHED_SHAPES
    assert (1, 3, torch.device("cpu")) not in tokens._orders
    assert (MAX_CACHED_SHAPES + 5, 3, torch.device("cpu")) in tokens._orders


def test_one_shard_is_told_apart_from_several() -> None:
    assert Problem(4, 4, 1, 1, 4, False, None).layout(0, 0).shards == 1
    assert Problem(4, 4, 1, 1, 4, True, None).layout(0, 0).shards == 4
    assert Problem(4, 4, 2, 3, 4, True, None).layout(0, 0).shards == 24

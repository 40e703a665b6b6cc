"""Ring, Ulysses and both against attention over the whole sequence in one process."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed import run_distributed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from hunyuan_kernels import lse_merge
from hunyuan_train.parallel import ring
from hunyuan_train.parallel.local_attention import attend
from hunyuan_train.parallel.ring import ChunkMasks
from hunyuan_train.parallel.ulysses import ContextCore, gather_sequence

ROWS, HEADS, WIDTH = 6, 4, 8  # of one rank
LAYOUTS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]  # ring, ulysses
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Case:
    """One attention problem; ``keys`` names which keys exist."""

    keys: str
    batch: int
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return f"{self.keys}-B{self.batch}-{str(self.dtype).removeprefix('torch.')}"


KINDS = ["all", "ragged", "padding", "empty_chunk", "sample_without_chunk", "sample_without_keys"]
CASES = [
    *(Case(kind, 3) for kind in KINDS),
    *(Case(kind, 1) for kind in ("all", "padding", "empty_chunk")),
    *(Case(kind, 3, torch.float32) for kind in KINDS),
    *(Case(kind, 3, torch.bfloat16) for kind in ("all", "ragged", "padding")),
]


def existing_keys(case: Case, rows: int, chunk: int) -> Tensor:
    """Return which keys exist, bool [B, S]; S is ``rows`` in chunks of ``chunk``."""
    generator = torch.Generator().manual_seed(3)
    exist = torch.rand(case.batch, rows, generator=generator) > 0.3
    exist[:, 0] = True
    if case.keys in ("all", "padding", "empty_chunk"):
        exist[:] = True
    if case.keys in ("padding", "sample_without_chunk"):
        exist[:, 1:3] = False  # in the middle, where the padding of a Ulysses rank lies
        exist[:, rows - 1] = False
    if case.keys == "empty_chunk" and rows > chunk:
        exist[:, -chunk:] = False
    if case.keys == "sample_without_chunk":
        exist[1, -chunk:] = False
        exist[1, 0] = True
    if case.keys == "sample_without_keys":
        exist[1] = False
    return exist


def chunk_masks(case: Case, exist: Tensor, chunks: int) -> ChunkMasks | None:
    """Drop rows that no sample has by index, and mask the rest."""
    if case.keys == "all":
        return None
    keep, masks = [], []
    for piece in exist.chunk(chunks, dim=1):
        rows = piece.any(dim=0).nonzero().flatten()
        whole = case.keys == "ragged" or rows.numel() == piece.shape[1]
        keep.append(None if whole else rows)
        kept = piece if whole else piece[:, rows]
        masks.append(None if bool(kept.all()) else kept)
    return ChunkMasks(tuple(keep), tuple(masks))


def problem(case: Case, world: int) -> list[Tensor]:
    """Return q, k, v and the gradient of the output, [B, S, A, E] of the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch, ROWS * world, HEADS, WIDTH)
    return [torch.randn(shape, generator=generator).to(case.dtype) for _ in range(4)]


def single_process(case: Case, world: int, exist: Tensor) -> list[Tensor]:
    """Return the output and dq, dk, dv of the definition in float64."""
    q, k, v, grad = (t.double() for t in problem(case, world))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    absent = ~exist.any(dim=1)[:, None, None, None]
    scores = torch.einsum("bqae,bkae->baqk", q, k) * WIDTH**-0.5
    scores = scores.masked_fill(~(exist[:, None, None, :] | absent), -torch.inf)
    out = torch.einsum("baqk,bkae->bqae", scores.softmax(-1), v).masked_fill(absent, 0)
    return [out, *torch.autograd.grad(out, (q, k, v), grad)]


def build_core(layout: tuple[int, int]) -> ContextCore:
    mesh = init_device_mesh("cpu", layout, mesh_dim_names=("ring", "ulysses"))
    return ContextCore(mesh.get_group("ring"), mesh.get_group("ulysses"))


def errors_of(case: Case, core: ContextCore, layout: tuple[int, int], fault: Any = None) -> float:
    """Return this rank's largest error of output and gradients, relative to the largest value."""
    rank, world = dist.get_rank(), layout[0] * layout[1]
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    exist = existing_keys(case, ROWS * world, ROWS * layout[1])
    *leaves, grad = (t[:, mine].clone() for t in problem(case, world))
    for leaf in leaves:
        leaf.requires_grad_()
    out = core(leaves[0], leaves[1], leaves[2], chunk_masks(case, exist, layout[0]))
    assert out.shape == (case.batch, ROWS, HEADS * WIDTH)
    assert out.dtype == case.dtype
    with (fault or contextmanager(lambda: iter([None])))():
        found = [out.unflatten(2, (HEADS, WIDTH))]
        found += torch.autograd.grad(out, leaves, grad.flatten(2))
    worst = 0.0
    for one, other in zip(found, single_process(case, world, exist), strict=True):
        assert bool(one.isfinite().all())
        worst = max(worst, float((one - other[:, mine]).abs().max() / other.abs().max()))
    return worst


def _all_cases(rank: int, world: int, layout: tuple[int, int]) -> dict[str, float]:
    core = build_core(layout)
    return {str(case): errors_of(case, core, layout) for case in CASES}


@functools.cache
def measured(layout: tuple[int, int]) -> dict[str, float]:
    """Return the largest error over ranks of every case; the ranks are started once."""
    ranks = run_distributed(_all_cases, layout[0] * layout[1], layout)
    return {name: max(errors[name] for errors in ranks) for name in ranks[0]}


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"ring{layout[0]}u{layout[1]}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout_agrees_with_a_single_process(layout: tuple[int, int], case: Case) -> None:
    assert measured(layout)[str(case)] <= TOLERANCE[case.dtype]


@contextmanager
def stale_keys() -> Iterator[None]:
    """Plant the error of diffusers#14265: every hop of the backward uses the keys of hop 0."""
    first: list[tuple[Tensor, Tensor]] = []
    right = ring._keys_of_hop

    def wrong(arrived: tuple[Tensor, Tensor], masks: ChunkMasks | None, chunk: int) -> Any:
        first.append(arrived)
        return right(first[0], masks, chunk)

    ring._keys_of_hop = wrong
    yield
    ring._keys_of_hop = right


def _stale_backward(rank: int, world: int) -> tuple[float, float]:
    core, case = build_core((world, 1)), Case("all", 2)
    good = errors_of(case, core, (world, 1))
    return good, errors_of(case, core, (world, 1), stale_keys)


@pytest.mark.dist
def test_backward_with_the_keys_of_hop_0_is_noticed() -> None:
    for good, planted in run_distributed(_stale_backward, 2):
        assert good <= TOLERANCE[torch.float64]
        assert planted > 0.05  # the output is right and nothing is nan: only gradients tell


def _spied(rank: int, world: int) -> tuple[str, str, list[int]]:
    """Record the order of forward and backward: K/k keys out/in, G/g gradients, C compute."""
    events: list[str] = []
    sent: list[int] = []
    compute, compute_backward, transfer = ring.attend, ring.attend_backward, ring._Transfer

    class Spy(transfer):
        def __init__(self, buffer: Tensor, place: Any, tag: int) -> None:
            self.letter = "K" if tag == ring._KEYS_TAG else "G"
            events.append(self.letter)
            sent.append(buffer.nbytes)
            super().__init__(buffer, place, tag)

        def wait(self) -> Tensor:
            events.append(self.letter.lower())
            return super().wait()

    ring._Transfer = Spy
    ring.attend = lambda *args: (events.append("C"), compute(*args))[1]
    ring.attend_backward = lambda *args: (events.append("C"), compute_backward(*args))[1]
    core = build_core((world, 1))
    q = torch.randn(2, ROWS, HEADS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    out = core(q, q, q, None)
    forward = "".join(events)
    events.clear()
    out.sum().backward()
    return forward, "".join(events), sent


@pytest.mark.dist
def test_the_next_hop_leaves_before_this_hop_computes() -> None:
    elements = 2 * 2 * ROWS * HEADS * WIDTH
    for forward, backward, sent in run_distributed(_spied, 4):
        assert forward == "KCk" * 3 + "C"
        # Gradients start after the first foreign chunk and travel under the next compute.
        assert backward == "KCk" + "KCGk" + "KCgGk" + "CgG" + "g"
        assert sorted(sent) == [2 * elements] * 6 + [4 * elements] * 3  # bf16 keys, fp32 gradients


def _recomputed(rank: int, world: int) -> None:
    core = build_core((2, 2))
    case = Case("ragged", 3, torch.float32)
    masks = chunk_masks(case, existing_keys(case, ROWS * world, 2 * ROWS), 2)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    q, k, v, grad = (t[:, mine].clone() for t in problem(case, world))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    wanted = torch.autograd.grad(core(q, k, v, masks), leaves, grad.flatten(2))
    for reentrant in (False, True):
        for leaf in leaves:
            leaf.grad = None
        out = checkpoint(core, q, k, v, masks, use_reentrant=reentrant)
        assert isinstance(out, Tensor)
        out.backward(grad.flatten(2))
        for leaf, gradient in zip(leaves, wanted, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(leaf.grad, gradient, rtol=0, atol=0)


@pytest.mark.dist
def test_recompute_repeats_the_same_numbers() -> None:
    run_distributed(_recomputed, 4)


def _ulysses(rank: int, world: int) -> int:
    group = dist.group.WORLD
    assert group is not None
    three = torch.zeros(1, ROWS, 3, WIDTH)
    with pytest.raises(ValueError, match=r"group of 2 does not divide 3 local heads.*from 1 3"):
        gather_sequence(three, three, three, group)
    calls: list[int] = []
    all_to_all = dist.all_to_all_single

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = counted
    four = torch.zeros(1, ROWS, 4, WIDTH)
    whole = gather_sequence(four, four, four, group)
    assert whole[0].shape == (1, 2 * ROWS, 2, WIDTH)
    return len(calls)


@pytest.mark.dist
def test_ulysses_moves_q_k_v_at_once_and_names_legal_sizes() -> None:
    assert run_distributed(_ulysses, 2) == [1, 1]


def test_backward_keeps_five_tensors() -> None:
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t
    ):
        ring.ring_attention(q, q, q, None, None)
    assert kept == [(1, 4, 2, 8)] * 4 + [(1, 2, 4)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    spread=st.sampled_from([1.0, 30.0]),
    data=st.data(),
)
def test_merge_is_free_of_order_and_grouping(
    seed: int, cuts: list[int], spread: float, data: st.DataObject
) -> None:
    """Merging attention over any pieces of the keys, in any order, is attention over all."""
    generator = torch.Generator().manual_seed(seed)
    keys = sum(cuts)
    q, k, v = (
        torch.randn(2, rows, 2, 4, generator=generator, dtype=torch.float64) * spread
        for rows in (3, keys, keys)
    )
    mask = torch.rand(2, keys, generator=generator) > 0.4  # some samples have no key somewhere
    wanted, wanted_lse = attend(q, k, v, mask)
    pieces = list(zip(k.split(cuts, 1), v.split(cuts, 1), mask.split(cuts, 1), strict=True))
    out, lse = torch.zeros_like(q), torch.full((2, 2, 3), -torch.inf, dtype=torch.float64)
    for index in data.draw(st.permutations(range(len(cuts)))):
        lse = lse_merge(out, lse, *attend(q, *pieces[index]))
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, wanted_lse, rtol=1e-10, atol=1e-10)

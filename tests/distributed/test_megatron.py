"""A column-row pair of Megatron's linears equals the dense one, also below ``fully_shard``.

Importing Megatron takes seconds, so one job runs all cases.
"""

import sys
from functools import cache

import pytest
import torch
from distributed import run_distributed
from megatron_shim import run_megatron_on_cpu
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.engines import megatron
from hunyuan_train.parallel.layout import Slices, fused_slices
from hunyuan_train.parallel.mesh import Axes, build_axes
from hunyuan_train.parallel.view import WholeView, fill_part

pytestmark = pytest.mark.dist

BATCH, TOKENS, HIDDEN = 4, 6, 5
PARTS = (4, 4, 4, 8)  # q, k, v and MLP units in one weight
NAMES = {"up.weight", "up.bias", "down.weight", "down.bias"}


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, sum(PARTS))
        self.down = nn.Linear(sum(PARTS), HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


def make_pair() -> Pair:
    torch.manual_seed(0)
    return Pair()


def batch() -> tuple[Tensor, Tensor]:
    """Inputs and the gradient of the outputs."""
    generator = torch.Generator().manual_seed(1)
    x, g = (torch.randn(BATCH, TOKENS, HIDDEN, generator=generator) for _ in range(2))
    return x.requires_grad_(), g


@cache
def reference() -> dict[str, Tensor]:
    """Output and every gradient of the dense pair."""
    pair, (x, g) = make_pair(), batch()
    out = pair(x)
    (out * g).sum().backward()
    grads = {name: p.grad for name, p in pair.named_parameters()}
    return {"out": out.detach(), "x": x.grad, **grads}


def cut(pair: Pair, axes: Axes, sp: bool) -> dict[str, Slices]:
    rank, size, group = axes.rank("tp"), axes.size("tp"), axes.group("tp")
    up = fused_slices((sum(PARTS), HIDDEN), 0, PARTS, rank, size)
    down = fused_slices((HIDDEN, sum(PARTS)), 1, PARTS, rank, size)
    pair.up = megatron.megatron_linear(pair.up, "column", up, group, sp)
    pair.down = megatron.megatron_linear(pair.down, "row", down, group, sp)
    assert {name for name, _ in pair.named_parameters()} == NAMES
    assert pair.state_dict().keys() == NAMES
    return {"up.weight": up, "up.bias": Slices((sum(PARTS),), 0, up.runs), "down.weight": down}


def tensor_parallel(axes: Axes, sp: bool, strided: bool) -> dict:
    pair = make_pair()
    slices = cut(pair, axes, sp)
    pair.load_state_dict(pair.state_dict())
    size, rank = axes.size("tp") if sp else 1, axes.rank("tp") if sp else 0
    x, g = (t.detach().chunk(size, dim=1)[rank] for t in batch())
    if strided:  # as a view of something else may be
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    x.requires_grad_()
    out = pair(x)
    assert out.is_contiguous()
    (out * g).sum().backward()
    grads = {name: p.grad for name, p in pair.named_parameters()}
    return {"slices": slices, "out": out.detach(), "x": x.grad, **grads}


def fully_sharded(axes: Axes, sp: bool, meta: bool) -> dict:
    """Tensor parallelism below ``fully_shard``: gradients of this rank's shards, summed."""
    whole = {name: p.detach() for name, p in make_pair().named_parameters()}
    pair = make_pair()
    if meta:
        pair.to("meta")
    slices = cut(pair, axes, sp)
    fully_shard(pair, mesh=axes.zero_mesh["zero"])
    if meta:
        pair.to_empty(device="cpu")
        with torch.no_grad():
            for name, p in pair.named_parameters():
                fill_part(WholeView.of(p, slices.get(name)), whole[name])
    size, rank = axes.size("tp") if sp else 1, axes.rank("tp") if sp else 0
    replicas, replica = axes.size("zero"), axes.rank("zero")
    x, g = (t.detach().chunk(replicas)[replica].chunk(size, dim=1)[rank] for t in batch())
    out = pair(x)
    (out * g * replicas).sum().backward()
    assert not any(hasattr(p, "main_grad") for p in pair.parameters())
    grads = {name: p.grad.full_tensor() for name, p in pair.named_parameters()}
    return {"slices": slices, "out": out.detach(), **grads}


def _pairs(rank: int, world: int) -> dict:
    run_megatron_on_cpu()
    axes = build_axes(ParallelConfig(tp=2), "cpu", world)
    cases = [(sp, option) for sp in (False, True) for option in (False, True)]
    return {
        "alone": {case: tensor_parallel(axes, *case) for case in cases},
        "sharded": {case: fully_sharded(axes, *case) for case in cases},
    }


@cache
def results() -> list[dict]:
    return run_distributed(_pairs, 4)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def check_gradients(ranks: list[dict], sp: bool) -> None:
    """Compare the gradients on the ranks of one tensor-parallel group."""
    expected = reference()
    for result in ranks:
        for name, slices in result["slices"].items():
            close(result[name], slices.take(expected[name]))
        if not sp:
            close(result["down.bias"], expected["down.bias"])
    if sp:  # Each rank added it to its own tokens.
        close(ranks[0]["down.bias"] + ranks[1]["down.bias"], expected["down.bias"])


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("sp", [False, True], ids=["tp", "sp"])
def test_a_pair_equals_the_dense_one(sp: bool, strided: bool):
    ranks = [result["alone"][sp, strided] for result in results()[:2]]
    check_gradients(ranks, sp)
    for key in ("out", "x"):
        found = [result[key] for result in ranks]
        for tensor in [torch.cat(found, dim=1)] if sp else found:
            close(tensor, reference()[key])


@pytest.mark.parametrize("meta", [False, True], ids=["real", "meta"])
@pytest.mark.parametrize("sp", [False, True], ids=["tp", "sp"])
def test_a_pair_below_fully_shard_equals_the_dense_one(sp: bool, meta: bool):
    ranks = [result["sharded"][sp, meta] for result in results()]
    for replica in range(2):
        group = ranks[2 * replica : 2 * replica + 2]
        check_gradients(group, sp)
        found = [result["out"] for result in group]
        for tensor in [torch.cat(found, dim=1)] if sp else found:
            close(tensor, reference()["out"].chunk(2)[replica])


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    megatron._megatron_types.cache_clear()
    with pytest.raises(ValueError, match=r"pip install hunyuan_train\[megatron\]"):
        megatron.megatron_linear(nn.Linear(2, 2), "column", None, None, False)

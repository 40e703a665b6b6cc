"""The global gradient norm over plain, sharded and differently sharded parameters."""

import pytest
import torch
from distributed import RankError, run_distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from hunyuan_train.optim.clip import clip_grad_norm

pytestmark = pytest.mark.dist


def _grads(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"plain": (5,), "zero": (7, 6), "tp_zero": (8, 12), "tp": (6, 4), "odd": (3,)}
    return {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}


def _full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _clip_mixed(rank: int, world: int, max_norm: float, bad: float) -> tuple[float, dict, bool]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    layouts = {
        "plain": None,
        "zero": (mesh["dp"], [Shard(0)]),
        "odd": (mesh["dp"], [Shard(0)]),
        "tp_zero": (mesh, [Shard(0), Shard(1)]),
        "tp": (mesh, [Replicate(), Shard(1)]),
    }
    params = []
    for name, grad in _grads().items():
        if bad and name == "zero":
            grad[6, 5] = bad  # On one rank only.
        layout = layouts[name]
        value = grad if layout is None else distribute_tensor(grad, *layout)
        param = nn.Parameter(torch.zeros_like(value))
        param.grad = value
        params.append(param)
    norm = clip_grad_norm(params, max_norm)
    assert type(norm) is torch.Tensor
    grads = {name: _full(p.grad) for name, p in zip(_grads(), params, strict=True)}
    return norm.item(), grads, bool(torch.isfinite(norm))


@pytest.mark.parametrize("max_norm", [0.0, 0.7, 1e6])
def test_norm_and_gradients_equal_one_process(max_norm: float):
    params = []
    for grad in _grads().values():
        params.append(nn.Parameter(torch.zeros_like(grad)))
        params[-1].grad = grad
    expected = nn.utils.clip_grad_norm_(params, max_norm or float("inf"))
    for norm, grads, _ in run_distributed(_clip_mixed, 4, max_norm, 0.0):
        assert norm == pytest.approx(expected.item(), rel=1e-6)
        for mine, reference in zip(grads.values(), params, strict=True):
            torch.testing.assert_close(mine, reference.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_of_one_rank_is_seen_by_all(bad: float):
    assert [finite for _, _, finite in run_distributed(_clip_mixed, 4, 1.0, bad)] == [False] * 4


def _clip_partial(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(DTensor.from_local(torch.zeros(4), mesh, [Replicate()]))
    param.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    clip_grad_norm([param], 1.0)


def test_gradients_that_still_have_to_be_summed_are_refused():
    with pytest.raises(RankError, match="must be summed before they are clipped"):
        run_distributed(_clip_partial, 2)


def _clip_cut(rank: int, world: int) -> tuple[float, list[float]]:
    cut, whole = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    cut.grad, whole.grad = torch.full((2,), 1.0 + 2.0 * rank), torch.full((2,), 4.0)
    norm = clip_grad_norm([cut, whole], 1.0, cuts=[2, 1])
    return norm.item(), cut.grad.tolist()


def test_tensor_parallel_parts_count_once_and_copies_once():
    # Parts 1 1 | 3 3 and one copy of 4 4.
    expected = (1 + 1 + 9 + 9 + 16 + 16) ** 0.5
    for rank, (norm, grad) in enumerate(run_distributed(_clip_cut, 2)):
        assert norm == pytest.approx(expected)
        assert grad == pytest.approx([(1 + 2 * rank) / expected] * 2)

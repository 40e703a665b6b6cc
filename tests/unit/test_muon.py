"""Muon against torch's own, and what it leaves alone."""

import pytest
import torch
from torch import nn

from hunyuan_train.memory.config import MemoryConfig, Place
from hunyuan_train.optim.choices import check_choices
from hunyuan_train.optim.config import OptimizerConfig, Rule
from hunyuan_train.optim.muon import BUFFER, MuonAdamW, orthogonalized
from hunyuan_train.parallel.config import ParallelConfig

CONFIG = OptimizerConfig(rule=Rule.muon, lr=1e-2, muon_lr=0.05, weight_decay=0.1)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Conv3d(20, 8, 3), nn.GroupNorm(2, 8))


def with_gradients(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = torch.randn(param.shape, generator=generator)
    return model


def test_matrices_move_as_in_torch():
    model, oracle = network(), network()
    rule = MuonAdamW(model, CONFIG)
    kernel = nn.Parameter(oracle[1].weight.detach().flatten(1))
    theirs = torch.optim.Muon([oracle[0].weight, kernel], lr=0.05, weight_decay=0.1, momentum=0.95)
    for step in range(4):
        with_gradients(model, step)
        with_gradients(oracle, step)
        kernel.grad = oracle[1].weight.grad.flatten(1)
        assert rule.step(torch.tensor(1.0)) == 0.0
        theirs.step()
    # torch iterates in bfloat16.
    moved = [model[0].weight, model[1].weight.flatten(1)]
    for ours, other in zip(moved, (oracle[0].weight, kernel), strict=True):
        torch.testing.assert_close(ours, other, atol=4e-3, rtol=0.0)


def test_the_others_move_as_with_adamw():
    model, oracle = network(), network()
    rule = MuonAdamW(model, CONFIG)
    plain = [p for p in oracle.parameters() if p.ndim < 2]
    adam = torch.optim.AdamW(plain, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(3):
        with_gradients(model, step)
        with_gradients(oracle, step)
        rule.step(torch.tensor(1.0))
        adam.step()
    found = [p for p in model.parameters() if p.ndim < 2]
    assert len(found) == 4
    for ours, other in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, other)


def test_singular_values_end_near_one():
    generator = torch.Generator().manual_seed(1)
    for shape in ((40, 10), (10, 40), (8, 4, 3, 3, 3)):
        result = orthogonalized(torch.randn(shape, generator=generator))
        values = torch.linalg.svdvals(result.flatten(1))
        assert result.shape == shape
        assert 0.5 < values.min() <= values.max() < 1.4


def test_an_update_that_is_not_finite_changes_nothing():
    model = with_gradients(network(), 0)
    rule = MuonAdamW(model, CONFIG)
    rule.step(torch.tensor(1.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {n: s[BUFFER].clone() for n, s in rule.tensors().items() if BUFFER in s}
    with_gradients(model, 1)
    model[1].weight.grad[0, 0] = float("nan")
    model[0].weight.grad[0, 0] = float("inf")
    assert rule.step(torch.tensor(float("nan"))) == 1.0
    for name, param in model.named_parameters():
        assert torch.equal(param, before[name]), name
        assert param.grad is None
    assert all(torch.equal(rule.tensors()[n][BUFFER], kept) for n, kept in momenta.items())


def test_the_rates_keep_their_ratio():
    model, half = with_gradients(network(), 0), with_gradients(network(), 0)
    start = network()
    MuonAdamW(model, CONFIG).step(torch.tensor(1.0))
    rule = MuonAdamW(half, CONFIG)
    rule.set_learning_rate(CONFIG.lr / 2)
    rule.step(torch.tensor(1.0))
    for full, part, first in zip(
        model.parameters(), half.parameters(), start.parameters(), strict=True
    ):
        torch.testing.assert_close(part - first, (full - first) / 2, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("memory", "parallel", "other"),
    [
        (MemoryConfig(optimizer_device=Place.host), ParallelConfig(), "memory.optimizer_device"),
        (MemoryConfig(), ParallelConfig(tp=2), "parallel.tp=2"),
    ],
)
def test_what_muon_cannot_be_combined_with_is_named(memory, parallel, other):
    with pytest.raises(ValueError, match=f"optimizer.rule=muon cannot be combined with {other}"):
        check_choices(memory, CONFIG, parallel, 2)

"""FusedAdam of apex behind the trainer's updates, with a stand-in that has its interface."""

import math
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from hunyuan_train.memory.config import MemoryConfig
from hunyuan_train.optim.apex import ApexAdamW
from hunyuan_train.optim.clip import clip_grad_norm
from hunyuan_train.optim.config import Implementation, OptimizerConfig
from hunyuan_train.optim.plain import PlainAdamW
from hunyuan_train.optim.updates import build_updates
from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import Axes

CFG = OptimizerConfig(lr=1e-2, weight_decay=0.3, implementation=Implementation.apex)


class FusedAdam(torch.optim.Optimizer):
    """What apex documents: plain tensors, moments in its state, a host count per group."""

    def __init__(self, params, lr, betas, eps, adam_w_mode):
        assert adam_w_mode
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            assert isinstance(group["step"], int)
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                state["exp_avg"].lerp_(p.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                first = state["exp_avg"] / (1 - beta1 ** group["step"])
                second = state["exp_avg_sq"] / (1 - beta2 ** group["step"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * first / (second.sqrt() + group["eps"]))


@pytest.fixture
def apex(monkeypatch):
    package, optimizers = ModuleType("apex"), ModuleType("apex.optimizers")
    optimizers.FusedAdam = FusedAdam
    monkeypatch.setitem(sys.modules, "apex", package)
    monkeypatch.setitem(sys.modules, "apex.optimizers", optimizers)


def small(device="cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6)).to(device)


def train(model, rule, steps, spoil=-1):
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        model(x.to(model[0].weight.device)).pow(3).sum().backward()
        if step == spoil:
            model[0].bias.grad[0] = math.nan
        rule.step(clip_grad_norm(model.parameters(), 1.0))


def test_updates_skips_and_resume_are_those_of_torch(apex):
    ours, theirs, resumed = small(), small(), small()
    rule, other = ApexAdamW(ours, CFG), PlainAdamW(theirs, CFG)
    train(ours, rule, range(4), spoil=2)
    train(theirs, other, range(4), spoil=2)
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rule.tensors(), other.tensors(), rtol=1e-5, atol=1e-6)
    again = ApexAdamW(resumed, CFG)
    resumed.load_state_dict(ours.state_dict())
    for name, state in again.tensors().items():
        for key, tensor in state.items():
            tensor.copy_(rule.tensors()[name][key])
    train(ours, rule, range(4, 6))
    train(resumed, again, range(4, 6))
    torch.testing.assert_close(ours.state_dict(), resumed.state_dict(), rtol=0, atol=0)


def test_it_is_taken_where_it_is_chosen_and_named_where_it_is_not_there(apex, monkeypatch):
    model = ParallelModel(small(), Axes.alone(), {}, frozenset())
    plain = ParallelConfig(zero_stage=0)
    moments = build_updates(model, plain, CFG).local_moments()
    assert moments["0.weight"]["step"].device.type == "cpu"
    with pytest.raises(ValueError, match=r"cannot be combined with memory\.fused_backward=true"):
        build_updates(model, plain, CFG, MemoryConfig(fused_backward=True))
    monkeypatch.setitem(sys.modules, "apex", None)
    monkeypatch.delitem(sys.modules, "apex.optimizers")
    with pytest.raises(ValueError, match=r"optimizer\.implementation=apex needs NVIDIA's apex"):
        build_updates(model, plain, CFG)


@pytest.mark.gpu
def test_on_a_gpu():
    pytest.importorskip("apex")
    ours, theirs = small("cuda"), small("cuda")
    train(ours, ApexAdamW(ours, CFG), range(4))
    train(theirs, PlainAdamW(theirs, CFG), range(4))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-5, atol=1e-6)

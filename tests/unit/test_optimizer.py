"""AdamW set-up: groups, eager state, the masked update, clipping in one process."""

import copy

import pytest
import torch
from torch import nn

from hunyuan_train.optim.clip import clip_grad_norm
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.groups import build_optimizer, optimizer_tensors, step_if_finite


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv3d(2, 6, (1, 2, 2)), nn.Flatten(), nn.Linear(48, 16), nn.LayerNorm(16)
    )
    for param in model.parameters():
        nn.init.normal_(param, std=0.1)
    return model


def _backward(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model.zero_grad()
    model(torch.randn(4, 2, 2, 3, 3, generator=generator)).square().sum().backward()


def test_only_parameters_of_two_or_more_dimensions_decay():
    optimizer = build_optimizer(_model(), OptimizerConfig(weight_decay=0.3))
    groups = {g["name"]: (g["param_names"], g["weight_decay"]) for g in optimizer.param_groups}
    assert groups == {
        "decay": (["0.weight", "2.weight"], 0.3),
        "no_decay": (["0.bias", "2.bias", "3.weight", "3.bias"], 0.0),
    }


def test_updates_equal_the_plain_single_tensor_adamw():
    cfg = OptimizerConfig(lr=3e-3, beta1=0.8, beta2=0.93, eps=1e-6, weight_decay=0.2)
    ours, reference = _model(), _model()
    optimizer = build_optimizer(ours, cfg)
    oracle = torch.optim.AdamW(
        [
            {"params": [p for p in reference.parameters() if p.ndim > 1], "weight_decay": 0.2},
            {"params": [p for p in reference.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.8, 0.93),
        eps=1e-6,
        foreach=False,
        fused=False,
    )
    for seed in range(5):
        _backward(ours, seed)
        _backward(reference, seed)
        optimizer.step()
        oracle.step()
    for mine, theirs in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_the_state_exists_before_the_first_step_and_is_live():
    model = _model()
    optimizer = build_optimizer(model, OptimizerConfig())
    before = optimizer_tensors(optimizer)
    assert before.keys() == dict(model.named_parameters()).keys()
    assert all(t.count_nonzero() == 0 for state in before.values() for t in state.values())
    _backward(model, 0)
    optimizer.step()
    after = optimizer_tensors(optimizer)
    for name, state in after.items():
        assert state["step"].item() == 1
        assert state["exp_avg"].count_nonzero() > 0
        assert all(state[key].data_ptr() == before[name][key].data_ptr() for key in state)


def test_a_copied_state_continues_bitwise():
    model = _model()
    cfg = OptimizerConfig(lr=1e-2)
    optimizer = build_optimizer(model, cfg)
    for seed in range(3):
        _backward(model, seed)
        optimizer.step()
    twin = copy.deepcopy(model)
    resumed = build_optimizer(twin, cfg)
    for name, state in optimizer_tensors(resumed).items():
        for key, tensor in state.items():
            tensor.copy_(optimizer_tensors(optimizer)[name][key])
    for each, opt in ((model, optimizer), (twin, resumed)):
        _backward(each, 9)
        opt.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_nonfinite_update_changes_nothing_and_the_next_one_goes_on(bad: float):
    model, untouched = _model(), _model()
    cfg = OptimizerConfig(lr=1e-2)
    optimizer, reference = build_optimizer(model, cfg), build_optimizer(untouched, cfg)
    _backward(model, 0)
    next(model.parameters()).grad[0] = bad
    norm = clip_grad_norm(model.parameters(), 1.0)
    assert not torch.isfinite(norm)
    assert step_if_finite(optimizer, norm).item() == 1.0
    for mine, theirs in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    for each, opt in ((model, optimizer), (untouched, reference)):
        _backward(each, 1)
        assert step_if_finite(opt, clip_grad_norm(each.parameters(), 1.0)).item() == 0.0
    for mine, theirs in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert torch.isfinite(mine).all()


def test_clipping_equals_torch_and_zero_only_measures():
    model, reference = _model(), _model()
    _backward(model, 0)
    _backward(reference, 0)
    measured = clip_grad_norm(model.parameters(), 0.0)
    expected = nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
    torch.testing.assert_close(measured, expected)
    assert measured > 0.5
    torch.testing.assert_close(clip_grad_norm(model.parameters(), 0.5), expected)
    for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_parameters_without_a_gradient_are_left_out():
    model = _model()
    assert clip_grad_norm(model.parameters(), 1.0).item() == 0.0
    model[3].weight.grad = torch.full((16,), 3.0)
    assert clip_grad_norm(model.parameters(), 0.0).item() == pytest.approx(12.0)


def test_a_frozen_model_is_refused():
    with pytest.raises(ValueError, match="Linear has no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("lr", 0.0, r"optimizer\.lr=0\.0 must be above 0"),
        ("beta2", 1.0, r"optimizer\.beta2=1\.0 must be in \[0, 1\)"),
        ("warmup_steps", -1, r"optimizer\.warmup_steps=-1 must not be negative"),
        ("min_lr_ratio", 1.5, r"optimizer\.min_lr_ratio=1\.5 must be in \[0, 1\]"),
    ],
)
def test_bad_values_are_named(field: str, value: float, message: str):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**{field: value})

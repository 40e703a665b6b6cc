"""Weights in bfloat16, 8-bit moments, moments on the host, updates inside the backward."""

import gc
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from hunyuan_train.memory.config import MemoryConfig
from hunyuan_train.memory.states import CODE_BLOCK
from hunyuan_train.optim import low_bit
from hunyuan_train.optim.clip import clip_grad_norm
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.fused_backward import FusedBackward
from hunyuan_train.optim.lean import LeanAdamW, needs_lean
from hunyuan_train.optim.low_bit import Int8Moment, block_size
from hunyuan_train.optim.plain import PlainAdamW
from hunyuan_train.optim.stochastic_rounding import RoundingKey, stochastic_round

CPU = torch.device("cpu")
CFG = OptimizerConfig(lr=3e-3, weight_decay=0.1, clip_norm=0.0)
MODES = {
    "float32": {},
    "bf16": {"weights": "bfloat16"},
    "int8": {"optimizer_states": "int8"},
    "host": {"optimizer_device": "host"},
    "all": {"weights": "bfloat16", "optimizer_states": "int8", "optimizer_device": "host"},
}


def memory_of(mode: str) -> MemoryConfig:
    from hunyuan_train.memory.config import Place, StateType, WeightType

    types = {"weights": WeightType, "optimizer_states": StateType, "optimizer_device": Place}
    return MemoryConfig(**{field: types[field](value) for field, value in MODES[mode].items()})


def small_model(mode: str = "float32", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.LayerNorm(96), nn.Linear(96, 40))
    for param in model.parameters():
        nn.init.normal_(param, std=0.1)
    return model.bfloat16() if MODES[mode].get("weights") else model


def backward(model: nn.Module, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 64, generator=generator).to(next(model.parameters()).dtype)
    target = torch.tanh(2 * x[:, :40].float() - x[:, 20:60].float())
    loss = (model(x).float() - target).square().mean()
    loss.backward()
    return loss.detach()


def lean(model: nn.Module, mode: str, seed: int = 7) -> LeanAdamW:
    return LeanAdamW(dict(model.named_parameters()), CFG, memory_of(mode), seed)


def train(model: nn.Module, rule, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(backward(model, step).item())
        rule.step(clip_grad_norm(model.parameters(), 0.0))
    return losses


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


# Rounding


def test_rounding_is_right_on_average_and_never_further_than_a_neighbour():
    # 37 values between two neighbours of different size and sign, each rounded 20,000 times.
    values = torch.linspace(-3.0, 3.0, 37) * 1.00037
    draws = 20_000
    many = values.repeat(draws, 1)
    rounded = stochastic_round(many, RoundingKey(1, "a", CPU).at(torch.tensor(5.0))).float()
    low = many.view(torch.int32) & -0x10000
    below = low.view(torch.float32)
    above = (low + 0x10000).view(torch.float32)
    assert bool(((rounded == below) | (rounded == above)).all())
    gap = (above - below)[0].abs()
    share = ((values - below[0]) / (above - below)[0]).clamp(0, 1)
    deviation = gap * (share * (1 - share) / draws).sqrt()
    error = (rounded.mean(0) - values).abs()
    assert bool((error <= 5 * deviation + 1e-6).all()), (error / deviation).max()


def test_what_bfloat16_holds_stays():
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38, math.inf, -math.inf, 2.0**-133])
    exact = exact.bfloat16().float()
    for count in range(50):
        key = RoundingKey(1, "a", CPU).at(torch.tensor(float(count)))
        assert torch.equal(stochastic_round(exact, key).float(), exact)
    assert stochastic_round(torch.full((3,), math.nan), key).isnan().all()


def test_draws_depend_on_seed_name_update_and_position_alone():
    half = torch.full((4096,), 1.0 + 2**-8)  # half way between two neighbours

    def drawn(seed=1, name="a", count=3.0, start=0, size=4096):
        key = RoundingKey(seed, name, CPU).at(torch.tensor(count))
        return stochastic_round(half[:size], key, start).float() > 1.0

    whole = drawn()
    assert torch.equal(whole, drawn())
    assert torch.equal(whole[1000:1500], drawn(start=1000, size=500))
    assert 0.45 < whole.float().mean() < 0.55
    for other in (drawn(seed=2), drawn(name="b"), drawn(count=4.0), drawn(start=1)):
        agree = (other == whole).float().mean().item()
        assert 0.45 < agree < 0.55, agree
    many = torch.stack([drawn(count=float(n)) for n in range(400)]).float()
    # One element over updates, and neighbours in one update, are as good as independent.
    assert (many.mean(0) - 0.5).abs().max() < 0.5 * 5 / math.sqrt(400)
    lagged = (many[:, 1:] * 2 - 1) * (many[:, :-1] * 2 - 1)
    assert abs(lagged.mean().item()) < 5 / math.sqrt(many.numel())
    lagged = (many[1:] * 2 - 1) * (many[:-1] * 2 - 1)
    assert abs(lagged.mean().item()) < 5 / math.sqrt(many.numel())


def test_updates_far_below_the_resolution_add_up():
    """AdamW moves a weight by about lr; at 1.0 bfloat16 has steps of 2^-7 up and 2^-8 down."""
    lr, updates = 1e-5, 200
    param = nn.Parameter(torch.ones(64, 512, dtype=torch.bfloat16))
    cfg = replace(CFG, lr=lr, weight_decay=0.0)
    rule = LeanAdamW({"p": param}, cfg, memory_of("bf16"), 0)
    for _ in range(updates):
        param.grad = torch.ones_like(param)
        rule.step(torch.ones(()))
    moved = 1.0 - param.detach().float().mean().item()
    deviation = math.sqrt(lr * updates * 2**-8 / param.numel())
    assert abs(moved - lr * updates) < 5 * deviation
    plain = torch.optim.AdamW([still := nn.Parameter(torch.ones(8).bfloat16())], lr=lr)
    for _ in range(updates):
        still.grad = torch.ones_like(still)
        plain.step()
    assert bool((still == 1).all())


# 8-bit moments


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_those_of_torchao(signed):
    from torchao.optim.subclass_8bit import OptimState8bit

    empty = OptimState8bit.zeros((16, 512), signed)
    assert torch.equal(low_bit._table(signed, CPU), empty.qmap)
    torch.manual_seed(0)
    values = torch.randn(16, 512) * torch.logspace(-8, 2, 16)[:, None]
    values = values if signed else values.square()
    moment = Int8Moment(256, signed=signed)
    stored = {k: torch.zeros(s, dtype=d) for k, (s, d) in moment.shapes(values.shape).items()}
    assert not moment.read(stored).any()
    moment.write(stored, values, torch.zeros(()))
    theirs = OptimState8bit.zeros(values.shape, signed).copy_(values)
    assert (stored["_codes"] == theirs.codes).float().mean() > 0.999  # ties may go either way
    assert torch.equal(stored["_scale"].view(-1), theirs.scale)
    torch.testing.assert_close(moment.read(stored), theirs.dequantize(), rtol=0.02, atol=1e-30)


def test_blocks_divide_rows_and_vectors_stay_float32():
    sizes = {(3072, 12_288): 256, (3072, 16, 1, 2, 2): 64, (7, 300): 150, (5, 257): 0, (4096,): 0}
    assert {shape: block_size(torch.Size(shape)) for shape in sizes} == sizes


# Updates


def test_float32_on_the_device_is_torch_adamw_to_the_bit():
    ours, theirs = small_model(), small_model()
    assert train(ours, lean(ours, "float32"), range(6)) == train(
        theirs, PlainAdamW(theirs, CFG), range(6)
    )
    assert_same(weights(ours), weights(theirs))


@pytest.mark.parametrize("states", ["float32", "int8"])
def test_moments_on_the_host_change_nothing(states, monkeypatch):
    monkeypatch.setattr("hunyuan_train.optim.lean.PIECE", 8 * 96)  # several pieces per matrix
    device, host = small_model(), small_model()
    memory = memory_of(states)
    rules = [
        LeanAdamW(dict(model.named_parameters()), CFG, chosen, 7)
        for model, chosen in (
            (device, memory),
            (host, replace(memory, optimizer_device=memory_of("host").optimizer_device)),
        )
    ]
    assert train(device, rules[0], range(8)) == train(host, rules[1], range(8))
    assert_same(weights(device), weights(host))
    one, other = (rule.tensors() for rule in rules)
    for name in one:
        assert_same(one[name], other[name])


@pytest.mark.parametrize("mode", ["bf16", "all"])
def test_pieces_of_any_size_give_the_same(mode, monkeypatch):
    whole, pieces = small_model(mode), small_model(mode)
    rules = [lean(model, mode) for model in (whole, pieces)]
    train(whole, rules[0], range(3))
    monkeypatch.setattr("hunyuan_train.optim.lean.PIECE", 8 * 96)
    train(pieces, rules[1], range(3))
    assert_same(weights(whole), weights(pieces))


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_like_float32(mode):
    model, plain = small_model(mode), small_model()
    ours = train(model, lean(model, mode), range(150))
    theirs = train(plain, PlainAdamW(plain, CFG), range(150))
    last, wanted = sum(ours[-10:]) / 10, sum(theirs[-10:]) / 10
    assert wanted < 0.8 * sum(theirs[:10]) / 10
    assert last == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_a_copied_state_continues_to_the_bit(mode):
    model, twin = small_model(mode), small_model(mode, seed=1)
    rule, resumed = lean(model, mode), lean(twin, mode)
    train(model, rule, range(3))
    twin.load_state_dict(model.state_dict())
    for name, state in resumed.tensors().items():
        for key, tensor in state.items():
            tensor.copy_(rule.tensors()[name][key])
    assert train(model, rule, range(3, 6)) == train(twin, resumed, range(3, 6))
    assert_same(weights(model), weights(twin))


@pytest.mark.parametrize("mode", MODES)
def test_an_update_that_is_not_finite_changes_nothing(mode):
    model = small_model(mode)
    rule = lean(model, mode)
    train(model, rule, range(3))
    before = weights(model)
    moments = {n: {k: t.clone() for k, t in s.items()} for n, s in rule.tensors().items()}
    backward(model, 3)
    next(model.parameters()).grad[0, 0] = math.nan
    assert rule.step(clip_grad_norm(model.parameters(), 0.0)) == 1
    assert_same(before, weights(model))
    for name, state in rule.tensors().items():
        assert_same(moments[name], state)
    assert all(p.grad is None for p in model.parameters())
    backward(model, 4)
    assert rule.step(clip_grad_norm(model.parameters(), 0.0)) == 0
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_only_what_differs_from_torch_adamw_needs_this():
    assert not needs_lean(MemoryConfig())
    assert all(needs_lean(memory_of(mode)) for mode in MODES if mode != "float32")
    assert needs_lean(MemoryConfig(fused_backward=True))


def test_bytes_of_the_states_are_those_promised():
    model = nn.Linear(512, 256, bias=False)
    kept = lean(model, "int8").tensors()["weight"]
    held = sum(t.numel() * t.element_size() for t in kept.values() if t.ndim)
    assert held / model.weight.numel() == 2 * (1 + 4 / CODE_BLOCK)


# Inside the backward


def in_backward(model: nn.Module, mode: str) -> FusedBackward:
    return FusedBackward(dict(model.named_parameters()), lean(model, mode).update)


@pytest.mark.parametrize("mode", MODES)
def test_updates_in_the_backward_are_those_after_it_to_the_bit(mode):
    inside, after = small_model(mode), small_model(mode)
    fused, rule = in_backward(inside, mode), lean(after, mode)
    for step in range(5):
        assert torch.equal(backward(inside, step), backward(after, step))
        norm = clip_grad_norm(after.parameters(), 0.0)
        rule.step(norm)
        torch.testing.assert_close(fused.norm(), norm, rtol=2e-3 if mode != "float32" else 1e-6,
                                   atol=0.0)  # fmt: skip
        assert all(p.grad is None for p in inside.parameters())
    assert_same(weights(inside), weights(after))


def test_gradients_are_freed_as_they_are_used():
    """Of a deep stack the ordinary backward holds all gradients, this one a few at a time."""

    def most_alive(fused: bool) -> int:
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(12)])
        if fused:
            keep = in_backward(model, "float32")
        counts = []
        for layer in model:
            layer.register_full_backward_hook(
                lambda *_: counts.append(sum(p.grad is not None for p in model.parameters()))
            )
        model(torch.randn(4, 32, requires_grad=True)).sum().backward()
        counts.append(sum(p.grad is not None for p in model.parameters()))
        if fused:
            assert keep.norm() > 0
        gc.collect()
        return max(counts)

    assert most_alive(fused=False) == 12
    assert most_alive(fused=True) <= 1


def test_a_loss_that_is_not_finite_or_refused_changes_nothing():
    model = small_model()
    fused = in_backward(model, "float32")
    before = weights(model)
    (model(torch.ones(2, 64)).sum() * math.nan).backward()
    assert fused.norm().isnan()
    assert_same(before, weights(model))
    fused.refuse(torch.tensor(math.inf))
    backward(model, 0)
    assert torch.isfinite(fused.norm())  # it is the true norm, whatever was refused
    assert_same(before, weights(model))
    backward(model, 0)  # it was for one backward
    assert torch.isfinite(fused.norm())
    assert not torch.equal(before["0.weight"], model[0].weight)


def test_parameters_behind_a_gradient_that_is_not_finite_are_left_alone():
    model = small_model()
    in_backward(model, "float32")
    before = weights(model)
    model[2].register_full_backward_hook(lambda *call: (call[1][0] * math.nan,))
    backward(model, 0)
    assert not torch.equal(before["3.weight"], model[3].weight)  # its gradient came first
    assert torch.equal(before["0.weight"], model[0].weight)

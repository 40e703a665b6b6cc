"""The moving average of the weights in one process."""

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from hunyuan_train.memory.config import AveragePlace
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.ema import Ema


def _change(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn(param.shape, generator=generator).to(param.dtype))


def _model(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5)).to(dtype)
    _change(model, 100)
    return model


def test_it_equals_torch_averaged_model():
    model = _model()
    ema = Ema(model, OptimizerConfig(ema_decay=0.9, ema_warmup=False))
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    oracle.update_parameters(model)  # Its first call copies the weights.
    for step in range(6):
        _change(model, step)
        ema.update(step)
        oracle.update_parameters(model)
    for name, expected in oracle.module.named_parameters():
        torch.testing.assert_close(ema.state_dict()[name], expected.detach())


def test_the_warmup_forgets_the_first_weights_soon():
    ema = Ema(_model(), OptimizerConfig(ema_decay=0.99, ema_warmup=True))
    assert ema.decay(0) == pytest.approx(0.1)
    assert ema.decay(90) == pytest.approx(0.91)
    assert ema.decay(10_000) == 0.99


def test_the_average_is_float32_even_of_bfloat16_weights():
    model = _model(torch.bfloat16)
    ema = Ema(model, OptimizerConfig(ema_decay=0.999, ema_warmup=False))
    start = {n: p.detach().float() for n, p in model.named_parameters()}
    _change(model, 0)
    ema.update(0)
    for name, param in model.named_parameters():
        expected = start[name] + 0.001 * (param.detach().float() - start[name])
        assert ema.state_dict()[name].dtype == torch.float32
        torch.testing.assert_close(ema.state_dict()[name], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_exchanges_in_place_and_puts_both_back_bitwise(dtype: torch.dtype):
    model = _model(dtype)
    ema = Ema(model, OptimizerConfig(ema_decay=0.5, ema_warmup=False))
    _change(model, 0)
    ema.update(0)
    weights = copy.deepcopy(dict(model.named_parameters()))
    shadow = {n: t.clone() for n, t in ema.state_dict().items()}
    storage = [p.data_ptr() for p in model.parameters()]

    def look_inside_and_fail() -> None:
        with ema.swap():
            for name, param in model.named_parameters():
                assert torch.equal(param, shadow[name].to(dtype))
                assert not torch.equal(param, weights[name])
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        look_inside_and_fail()
    for name, param in model.named_parameters():
        assert torch.equal(param, weights[name])
        assert torch.equal(ema.state_dict()[name], shadow[name])
    assert storage == [p.data_ptr() for p in model.parameters()]


def test_updating_or_saving_a_swapped_average_is_a_bug():
    ema = Ema(_model(), OptimizerConfig())
    with ema.swap():
        with pytest.raises(AssertionError, match="average the average"):
            ema.update(0)
        with pytest.raises(AssertionError, match="raw weights"):
            ema.state_dict()


def test_state_comes_back_bitwise_and_reset_takes_the_weights():
    model = _model()
    ema = Ema(model, OptimizerConfig(ema_decay=0.5, ema_warmup=False))
    _change(model, 0)
    ema.update(0)
    other = Ema(model, OptimizerConfig())
    other.load_state_dict(ema.state_dict())
    for name, tensor in ema.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    other.reset()
    for name, param in model.named_parameters():
        assert torch.equal(other.state_dict()[name], param)


def test_a_state_of_another_model_is_refused():
    ema = Ema(_model(), OptimizerConfig())
    state = ema.state_dict()
    with pytest.raises(ValueError, match=r"missing \['1\.bias'\], unknown \['extra'\]"):
        ema.load_state_dict(
            {**{n: t for n, t in state.items() if n != "1.bias"}, "extra": state["1.bias"]}
        )
    with pytest.raises(ValueError, match=r"0\.bias has shape \(6,\), the model needs \(5,\)"):
        ema.load_state_dict({**state, "0.bias": torch.zeros(6)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_the_host_it_is_the_same_to_the_bit(dtype: torch.dtype, monkeypatch):
    monkeypatch.setattr("hunyuan_train.optim.ema.PIECE", 8)
    model, cfg = _model(dtype), OptimizerConfig(ema_decay=0.9)
    beside, away = Ema(model, cfg), Ema(model, cfg, place=AveragePlace.host)
    for step in range(4):
        _change(model, step)
        beside.update(step)
        away.update(step)
    for name, tensor in beside.state_dict().items():
        assert torch.equal(away.state_dict()[name], tensor)
    with away.swap():
        assert torch.equal(model[0].weight, beside.state_dict()["0.weight"].to(dtype))


def test_without_an_average_the_weights_stand_in():
    model = _model()
    ema = Ema(model, OptimizerConfig(), place=AveragePlace.off)
    before = copy.deepcopy(dict(model.named_parameters()))
    ema.update(0)
    ema.reset()
    assert ema.state_dict() == {}
    with ema.swap():
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())

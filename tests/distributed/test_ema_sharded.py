"""EMA and the masked update on sharded parameters equal those of one process."""

import pytest
import torch
from distributed import run_distributed
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hunyuan_train.optim.clip import clip_grad_norm
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.groups import build_optimizer, optimizer_tensors, step_if_finite

pytestmark = pytest.mark.dist

CFG = OptimizerConfig(lr=1e-2, weight_decay=0.1, ema_decay=0.8, ema_warmup=True)
BAD_STEP = 2


def _model() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 5), nn.LayerNorm(5))
    for param in model.parameters():
        nn.init.normal_(param, std=0.3)
    return model


def _full(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def _train(model: nn.Module) -> dict:
    optimizer, ema = build_optimizer(model, CFG), Ema(model, CFG)
    skipped = torch.zeros(())
    for step in range(5):
        data = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(data).square().mean()
        loss.backward()
        if step == BAD_STEP:
            first = next(model.parameters())
            local = first.grad.to_local() if isinstance(first.grad, DTensor) else first.grad
            if local.numel():
                local.view(-1)[0] = float("nan")
        skipped += step_if_finite(optimizer, clip_grad_norm(model.parameters(), 1.0))
        ema.update(step)
    data = torch.ones(2, 6)
    with torch.no_grad():
        before = model(data)
        with ema.swap():
            averaged = model(data)
        after = model(data)
    assert torch.equal(before, after)
    return {
        "skipped": skipped,
        "averaged": averaged,
        "weights": {n: _full(p) for n, p in model.named_parameters()},
        "ema": {n: _full(t) for n, t in ema.state_dict().items()},
        "moments": {n: _full(s["exp_avg_sq"]) for n, s in optimizer_tensors(optimizer).items()},
        "steps": [s["step"].item() for s in optimizer_tensors(optimizer).values()],
    }


def _train_sharded(rank: int, world: int) -> dict:
    model = _model()
    fully_shard(model[0])
    fully_shard(model)
    ema = Ema(model, CFG)
    for name, param in model.named_parameters():
        shadow = ema.state_dict()[name]
        assert isinstance(shadow, DTensor)
        assert shadow.placements == param.placements
        assert shadow.to_local().shape == param.to_local().shape
    return _train(model)


def test_sharded_training_with_a_skipped_update_equals_one_process():
    expected = _train(_model())
    assert expected["skipped"].item() == 1.0
    assert expected["steps"] == [4.0] * 6
    for result in run_distributed(_train_sharded, 2):
        assert result["steps"] == expected["steps"]
        for part in ("skipped", "averaged", "weights", "ema", "moments"):
            torch.testing.assert_close(result[part], expected[part], rtol=1e-5, atol=1e-6)

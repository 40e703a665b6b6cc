"""What a CPU cannot show: the model and a short run on an NVIDIA GPU. Run with `make test-gpu`."""

from pathlib import Path

import pytest
import torch
from tiny_run import make_data, overrides, rows, run_command

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]


def test_model_on_the_gpu_agrees_with_the_cpu() -> None:
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    cfg = HunyuanConfig(
        hidden_size=64,
        num_heads=4,
        num_double_blocks=2,
        num_single_blocks=2,
        rope_axes=[4, 6, 6],
        text_dim=24,
        pooled_dim=12,
    )
    model = HunyuanVideo(cfg)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = (
        torch.randn(2, 16, 3, 8, 8),
        torch.tensor([100.0, 900.0]),
        torch.randn(2, 6, 24),
        torch.tensor([[True] * 6, [True] * 3 + [False] * 3]),
        torch.randn(2, 12),
    )
    expected = model(*inputs)
    found = model.cuda()(*(x.cuda() for x in inputs)).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_short_run_trains_and_resumes(tmp_path: Path, dtype: str) -> None:
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    extra = ["run.device=cuda", f"parallel.compute_dtype={dtype}", "checkpoint.every_steps=3"]
    done = run_command("train", overrides(data, run, *extra))
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in rows(run)]
    assert len(losses) == 6
    assert losses[-1] < losses[0]

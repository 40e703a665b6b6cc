"""From a batch to the model's inputs: what the objective's fields change."""

import pytest
import torch
from tiny_run import MODEL

from hunyuan_train.config.compose import compose_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import Batch
from hunyuan_train.engine.inputs import ModelInputs, build_inputs
from hunyuan_train.engine.trial import MicroBatch, make_batch

CPU = torch.device("cpu")
SMALL, LARGE = Bucket(1, 64, 64), Bucket(5, 128, 128)


def config(*extra: str) -> RunConfig:
    return compose_config([*MODEL, "objective.text_drop=0", *extra])


def batch_of(cfg: RunConfig, bucket: Bucket = SMALL) -> Batch:
    return make_batch(cfg, MicroBatch(bucket, (3, 5)), 0, 7)


def inputs(cfg: RunConfig, bucket: Bucket = SMALL) -> ModelInputs:
    return build_inputs(batch_of(cfg, bucket), cfg, 1.0, CPU)


def test_shift_depends_on_the_tokens_of_the_bucket() -> None:
    cfg = config("objective.shift=2", f"objective.shift_tokens={SMALL.tokens}")
    small, large = inputs(cfg, SMALL), inputs(cfg, LARGE)
    assert LARGE.tokens == 8 * SMALL.tokens
    gained = torch.logit(large.sigma) - torch.logit(small.sigma)
    torch.testing.assert_close(gained, torch.full((2,), 8**0.5).log())


@pytest.mark.parametrize("weighting", ["none", "cosmap", "sigma_sqrt"])
def test_weights_follow_sigma(weighting: str) -> None:
    x = inputs(config(f"objective.weighting={weighting}"))
    if weighting == "none":
        assert x.weights is None
        return
    assert x.weights is not None
    wanted = {
        "cosmap": 2 / (torch.pi * (1 - 2 * x.sigma + 2 * x.sigma**2)),
        "sigma_sqrt": (1 / x.sigma**2).clamp(max=25.0),
    }
    torch.testing.assert_close(x.weights, wanted[weighting])

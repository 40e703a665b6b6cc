"""The closed form of the activations against what autograd saves."""

from dataclasses import replace

import pytest
import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.memory.estimate import Shards, activation_bytes, max_tokens, state_bytes
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.registry import build_model

TEXT = 8


def tiny(doubles: int, singles: int, ratio: float) -> HunyuanConfig:
    return replace(
        compose_config([]).model,
        hidden_size=256,
        num_heads=4,
        rope_axes=[16, 24, 24],
        num_double_blocks=doubles,
        num_single_blocks=singles,
        mlp_ratio=ratio,
    )


def saved_bytes(cfg: HunyuanConfig, sides: tuple[int, int, int]) -> tuple[int, int]:
    """Return the bytes autograd saves for one sample, weights aside, and its tokens."""
    model = build_model(cfg)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    frames, height, width = sides
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = model(
            torch.randn(1, cfg.in_channels, frames, 2 * height, 2 * width),
            torch.tensor([500.0]),
            torch.randn(1, TEXT, cfg.text_dim),
            None,
            torch.randn(1, cfg.pooled_dim),
            torch.tensor([6.0]) if cfg.guidance_embed else None,
        )
    assert kept.requires_grad
    return sum(saved.values()), frames * height * width + TEXT


@pytest.mark.parametrize(("doubles", "singles", "ratio"), [(2, 1, 4.0), (1, 3, 4.0), (2, 2, 2.0)])
def test_activations_are_what_autograd_saves(doubles: int, singles: int, ratio: float) -> None:
    cfg = tiny(doubles, singles, ratio)
    found, tokens = saved_bytes(cfg, (4, 16, 16))
    assert activation_bytes(cfg, 4, Shards()) * tokens == pytest.approx(found, rel=0.03)


def test_shards_share_the_memory() -> None:
    cfg = tiny(2, 2, 4.0)
    alone = activation_bytes(cfg, 2, Shards())
    assert activation_bytes(cfg, 2, Shards(cp=4)) == alone / 4
    assert activation_bytes(cfg, 2, Shards(tp=2, sp=True)) == alone / 2
    assert alone / 2 < activation_bytes(cfg, 2, Shards(tp=2)) < alone
    assert state_bytes(1000, Shards(tp=2, states=5)) == 2000


def test_tokens_fill_what_the_states_leave() -> None:
    cfg = tiny(2, 2, 4.0)
    tokens = max_tokens(cfg, 1_000_000, 2**30, 2, Shards(), reserve=0.0)
    used = state_bytes(1_000_000, Shards()) + tokens * activation_bytes(cfg, 2, Shards())
    assert 2**30 - activation_bytes(cfg, 2, Shards()) <= used <= 2**30
    with pytest.raises(ValueError, match=r"100,000,000 parameters take 1\.9 GiB of the 1"):
        max_tokens(cfg, 100_000_000, 2**30, 2, Shards())

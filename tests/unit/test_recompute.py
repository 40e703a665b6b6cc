"""What blocks keep in every mode, and that no gradient depends on it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from hunyuan_train.config.compose import compose_config
from hunyuan_train.memory.config import MemoryConfig, Recompute
from hunyuan_train.memory.recompute import BlockForward, mode_of, set_recompute
from hunyuan_train.memory.tracing import SavedBytes
from hunyuan_train.models.attention import SdpaCore
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.registry import build_model, sharding_plan
from hunyuan_train.parallel import ring
from hunyuan_train.parallel.apply import check_recompute, parallelize
from hunyuan_train.parallel.config import ParallelConfig, ZeroEngine
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.parallel.ulysses import ContextCore

TEXT = 7
MODES = [Recompute.selective, Recompute.full]
FLOAT = 4


def tiny(doubles: int = 2, singles: int = 2) -> HunyuanConfig:
    model = compose_config(["model=tiny"]).model
    return replace(model, num_double_blocks=doubles, num_single_blocks=singles)


def build(cfg: HunyuanConfig, memory: MemoryConfig | None) -> nn.Module:
    """Return a model without zeros, because zero gates hide the blocks behind them."""
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    parallelize(model, sharding_plan(cfg), Axes.alone(), ParallelConfig(zero_stage=0), memory)
    return model


def inputs(cfg: HunyuanConfig, lengths: tuple[int, ...] | None, side: int = 16) -> tuple:
    """Return one micro-batch; ``lengths`` of None are two full captions without a mask."""
    torch.manual_seed(side)
    samples = len(lengths or (0, 0))
    mask = None if lengths is None else torch.arange(TEXT) < torch.tensor(lengths)[:, None]
    return (
        torch.randn(samples, cfg.in_channels, 3, side, 16),
        torch.rand(samples) * 1000,
        torch.randn(samples, TEXT, cfg.text_dim),
        mask,
        torch.randn(samples, cfg.pooled_dim),
        torch.full((samples,), 6000.0) if cfg.guidance_embed else None,
    )


def gradients(model: nn.Module, *batches: tuple) -> dict[str, Tensor]:
    """Return the gradients of all batches, whose forwards come before all backwards."""
    model.zero_grad()
    losses = [model(*batch).square().sum() for batch in batches]
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def unequal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    assert len(ours) == len(theirs) > 70
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [None, (7, 4), (5,)], ids=["no mask", "mask", "one sample"])
def test_gradients_are_those_of_keeping_everything(mode: Recompute, lengths: tuple | None) -> None:
    cfg = tiny()
    batch = inputs(cfg, lengths)
    truth = gradients(build(cfg, None), batch)
    model = build(cfg, MemoryConfig(recompute=mode))
    set_recompute(model, mode)
    assert unequal(gradients(model, batch), truth) == []


@pytest.mark.parametrize("mode", MODES)
def test_a_second_run_sees_its_own_inputs_and_mask(mode: Recompute) -> None:
    cfg = tiny()
    batches = inputs(cfg, (7, 4)), inputs(cfg, (2, 6), side=12), inputs(cfg, None)
    truth = gradients(build(cfg, None), *batches)
    model = build(cfg, MemoryConfig())
    set_recompute(model, mode)
    assert unequal(gradients(model, *batches), truth) == []


def test_the_mode_is_that_of_the_forward() -> None:
    cfg = tiny()
    batches = [inputs(cfg, (7, 4)), inputs(cfg, (2, 6))]
    truth = gradients(build(cfg, None), *batches)
    model = build(cfg, MemoryConfig())
    set_recompute(model, Recompute.selective)
    first = model(*batches[0]).square().sum()
    set_recompute(model, Recompute.none)
    second = model(*batches[1]).square().sum()
    set_recompute(model, Recompute.full)
    first.backward()
    second.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert unequal(found, truth) == []


def test_a_kept_graph_can_be_run_backward_twice() -> None:
    cfg = tiny(1, 1)
    model = build(cfg, MemoryConfig())
    set_recompute(model, Recompute.selective)
    weights = [p for p in model.parameters() if p.requires_grad]
    loss = model(*inputs(cfg, (7, 4))).square().sum()
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Count how often an attention is computed."""
    count = 0
    original = ring.attend

    def counted(*args: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal count
        count += 1
        return original(*args)

    monkeypatch.setattr(ring, "attend", counted)
    return lambda: count


@pytest.mark.parametrize(("mode", "runs"), [("none", 1), ("selective", 1), ("full", 2)])
def test_only_full_runs_attention_twice(
    mode: str, runs: int, attentions: Callable[[], int]
) -> None:
    cfg = tiny(2, 3)
    model = build(cfg, MemoryConfig())
    set_recompute(model, Recompute(mode))
    gradients(model, inputs(cfg, (7, 4)))
    assert attentions() == 5 * runs


def test_without_gradients_nothing_is_kept(attentions: Callable[[], int]) -> None:
    cfg = tiny()
    model = build(cfg, MemoryConfig())
    batch = inputs(cfg, None)
    with torch.no_grad():
        truth = model(*batch)
        set_recompute(model, Recompute.selective)
        assert torch.equal(model(*batch), truth)
    assert attentions() == 8


def kept(cfg: HunyuanConfig, mode: Recompute) -> int:
    """Return the bytes autograd keeps of one forward, weights aside."""
    model = build(cfg, MemoryConfig())
    set_recompute(model, mode)
    saved = SavedBytes(model.parameters)
    with saved:
        out = model(*inputs(cfg, (7, 4)))
    assert out.requires_grad
    return saved.take()


def test_what_a_block_keeps_is_the_closed_form() -> None:
    """Full: B S h values of its input. Selective: as many of its attention, and B S A of lse."""
    small, deeper, longer = tiny(1, 1), tiny(3, 1), tiny(1, 4)
    rows = 2 * (3 * 8 * 8 + TEXT)
    block_input = rows * small.hidden_size * FLOAT
    attention = block_input + rows * small.num_heads * FLOAT
    for deep, blocks in ((deeper, 2), (longer, 3)):
        by_mode = {
            mode: (kept(deep, mode) - kept(small, mode)) / blocks
            for mode in (Recompute.none, *MODES)
        }
        assert by_mode[Recompute.full] == pytest.approx(block_input, rel=0.05)
        assert by_mode[Recompute.selective] == pytest.approx(block_input + attention, rel=0.05)
        assert by_mode[Recompute.none] > 8 * block_input


def test_only_blocks_with_attention_over_all_tokens_are_recomputed() -> None:
    cfg = tiny()
    model = build(cfg, MemoryConfig())
    modules = model.named_modules()
    replaced = [n for n, m in modules if isinstance(m.__dict__.get("forward"), BlockForward)]
    assert replaced == ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1"]
    assert set(model.state_dict()) == set(build_model(cfg).state_dict())


def test_a_model_that_was_not_prepared_says_so() -> None:
    model = build(tiny(1, 1), None)
    set_recompute(model, Recompute.none)
    with pytest.raises(AssertionError, match="no block of this model can do full"):
        set_recompute(model, Recompute.full)


def test_an_attention_that_cannot_be_kept_is_refused() -> None:
    cfg = tiny(1, 1)
    model = build(cfg, MemoryConfig())
    for module in model.modules():
        if isinstance(module, ContextCore):
            module.forward = SdpaCore().forward
    set_recompute(model, Recompute.selective)
    with pytest.raises(AssertionError, match="selective keeps nothing"):
        model(*inputs(cfg, None))


def test_the_mode_of_a_bucket() -> None:
    memory = MemoryConfig(recompute=Recompute.selective, recompute_of={"1x256x256": "none"})
    assert mode_of(memory, "1x256x256") is Recompute.none
    assert mode_of(memory, "129x720x1280") is Recompute.selective
    auto = MemoryConfig()
    assert mode_of(auto, "1x256x256") is Recompute.none
    for fitting, expected in (
        ({Recompute.selective, Recompute.full}, Recompute.selective),
        ({Recompute.full}, Recompute.full),
        (set(), Recompute.full),
    ):
        assert mode_of(auto, "1x256x256", fitting.__contains__) is expected


def test_stage_three_of_deepspeed_takes_one_mode() -> None:
    engine = ParallelConfig(zero_engine=ZeroEngine.deepspeed, zero_stage=3)
    mixed = MemoryConfig(recompute=Recompute.full, recompute_of={"1x256x256": "none"})
    with pytest.raises(
        ValueError, match=r"all ranks do the same; leave memory\.recompute_of empty"
    ):
        check_recompute(mixed, engine)
    check_recompute(mixed, ParallelConfig())
    check_recompute(mixed, ParallelConfig(zero_engine=ZeroEngine.deepspeed, zero_stage=2))
    check_recompute(MemoryConfig(recompute=Recompute.full), engine)

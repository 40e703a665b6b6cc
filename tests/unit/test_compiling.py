"""Compiled blocks compute what uncompiled ones do, from few graphs for all buckets."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed import run_distributed
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from hunyuan_train.config.compose import compose_config
from hunyuan_train.memory.compiling import GRAPHS, CompiledForward, apply_compile
from hunyuan_train.memory.config import MemoryConfig, Recompute, Switch
from hunyuan_train.memory.recompute import BlockForward, apply_recompute, set_recompute
from hunyuan_train.models.hunyuan.config import HunyuanConfig, ImageCondition
from hunyuan_train.models.registry import build_model, sharding_plan
from hunyuan_train.parallel.apply import apply_context, check_compile, parallelize
from hunyuan_train.parallel.config import ParallelConfig, ZeroEngine
from hunyuan_train.parallel.mesh import Axes, build_axes
from hunyuan_train.parallel.zero import apply_zero

pytestmark = pytest.mark.compile
LIMIT = 1e-5
MEMORY = MemoryConfig(compile=True, offload=Switch.on, offload_min_mib=0.0)


def tiny(doubles: int, singles: int) -> HunyuanConfig:
    model = compose_config(["model=tiny"]).model
    return replace(model, num_double_blocks=doubles, num_single_blocks=singles)


def build(cfg: HunyuanConfig, memory: MemoryConfig, backend: str | Callable[..., Any]) -> nn.Module:
    """Return a model without zeros, because zero gates hide the blocks behind them."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, plan = build_model(cfg), sharding_plan(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.05)
    apply_context(model, plan, Axes.alone())
    apply_compile(model, plan, memory, backend)
    apply_recompute(model, plan, memory)
    return model


def first_of(batch: tuple[Any, ...]) -> Tensor:
    """Return the mask of a batch whose first latent frames are given."""
    samples, _, frames = batch[0].shape[:3]
    return torch.arange(frames).expand(samples, frames) == 0


def inputs(
    cfg: HunyuanConfig, samples: int, side: int = 16, text: int = 7, masked: bool = True
) -> tuple[Any, ...]:
    """Return one micro-batch, with captions of several lengths if ``masked``."""
    torch.manual_seed(side)
    mask = torch.arange(text) < text - 1 - torch.arange(samples)[:, None]
    return (
        torch.randn(samples, cfg.in_channels, 3, side, 16),
        torch.rand(samples) * 1000,
        torch.randn(samples, text, cfg.text_dim),
        mask if masked else None,
        torch.randn(samples, cfg.pooled_dim),
        torch.full((samples,), 6000.0) if cfg.guidance_embed else None,
    )


def gradients(model: nn.Module, batch: tuple[Any, ...]) -> dict[str, Tensor]:
    """Return the gradients, and the output under the name ''."""
    model.zero_grad()
    out = model(*batch)
    out.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: grad.clone() for name, grad in found.items()} | {"": out.detach()}


def furthest(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest relative difference of a tensor."""
    assert found.keys() == wanted.keys()
    # Without single blocks nobody reads what the last double block makes of the text.
    unread = {n for n, tensor in wanted.items() if not tensor.any() and "double_blocks.1.txt" in n}
    assert not any(found[name].any() for name in unread)
    names = found.keys() - unread
    return max(float((found[n] - wanted[n]).norm() / wanted[n].norm()) for n in names)


def test_few_graphs_serve_all_blocks_and_buckets_in_every_mode() -> None:
    """Two classes of two blocks; 8 buckets, texts of 4 lengths, masks or none, train and eval."""
    cfg = tiny(2, 2)
    counter = CompileCounterWithBackend("eager")
    truth = build(cfg, replace(MEMORY, compile=False), "eager")
    model = build(cfg, MEMORY, counter)
    assert counter.frame_count == 0
    for samples in (2, 1, 3):
        for turn, side in enumerate((16, 4, 6, 8, 10, 12, 14, 18)):
            mode = list(Recompute)[1 + turn % 3]
            set_recompute(model, mode, offload=turn % 2 == 0)
            set_recompute(truth, mode, offload=False)
            batch = inputs(cfg, samples, side, text=5 + turn % 4, masked=turn % 2 == 1)
            assert furthest(gradients(model, batch), gradients(truth, batch)) < LIMIT
            with torch.no_grad():
                assert torch.equal(model(*batch), truth(*batch))
        assert counter.frame_count == (GRAPHS // 2 if samples == 2 else GRAPHS) * 2


def test_given_frames_double_the_graphs_and_share_them_between_buckets() -> None:
    cfg = replace(tiny(0, 1), image_condition=ImageCondition.token_replace)
    counter = CompileCounterWithBackend("eager")
    truth = build(cfg, replace(MEMORY, compile=False), "eager")
    model = build(cfg, MEMORY, counter)
    set_recompute(model, Recompute.selective)
    for samples, passes in ((2, 1), (1, 2)):
        for side in (4, 8):
            batch = inputs(cfg, samples, side)
            for more in ((), (first_of(batch),)):
                found = gradients(model, (*batch, *more))
                assert furthest(found, gradients(truth, (*batch, *more))) < LIMIT
        assert counter.frame_count == GRAPHS // 2 * passes * 2


def test_graphs_of_the_backward_are_right_with_every_mode() -> None:
    cfg = tiny(2, 0)
    truth, model = build(cfg, MemoryConfig(), "eager"), build(cfg, MEMORY, "aot_eager")
    for mode in (Recompute.none, Recompute.selective, Recompute.full):
        set_recompute(model, mode)
        for side in (8, 12):
            batch = inputs(cfg, 2, side)
            assert furthest(gradients(model, batch), gradients(truth, batch)) < LIMIT


def test_inductor() -> None:
    if shutil.which("g++") is None:
        pytest.skip("inductor needs g++ on a CPU")
    cfg = tiny(0, 2)
    truth, model = build(cfg, MemoryConfig(), "eager"), build(cfg, MEMORY, "inductor")
    set_recompute(model, Recompute.selective)
    for side in (8, 12):
        batch = inputs(cfg, 1, side)
        assert furthest(gradients(model, batch), gradients(truth, batch)) < LIMIT


def test_the_kept_attention_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from hunyuan_train.parallel import ring

    calls, original = [], ring.attend
    monkeypatch.setattr(ring, "attend", lambda *args: calls.append(0) or original(*args))
    cfg = tiny(0, 2)
    model = build(cfg, MEMORY, "eager")
    for mode, runs in ((Recompute.selective, 2), (Recompute.full, 4)):
        set_recompute(model, mode)
        calls.clear()
        gradients(model, inputs(cfg, 2))
        assert len(calls) == runs


def _sharded(rank: int, world: int) -> float:
    cfg = tiny(0, 2)
    layout = ParallelConfig(zero_stage=3, compute_dtype="float32", reduce_dtype="float32")
    axes = build_axes(layout, "cpu", world)
    truth, model = build(cfg, MemoryConfig(), "eager"), build(cfg, MEMORY, "eager")
    apply_zero(model, sharding_plan(cfg), axes, layout)
    set_recompute(model, Recompute.selective)
    batch = inputs(cfg, 1 + rank)  # one graph of each kind at the same time
    wanted = gradients(truth, batch)
    found = gradients(model, batch)
    for name, grad in wanted.items():
        if name:
            torch.distributed.all_reduce(grad, torch.distributed.ReduceOp.AVG)
            found[name] = found[name].full_tensor()
    return furthest(found, wanted)


@pytest.mark.dist
def test_shards_are_gathered_around_compiled_blocks() -> None:
    assert max(run_distributed(_sharded, 2)) < LIMIT


def test_compiling_is_asked_for_in_the_config() -> None:
    cfg = tiny(1, 1)
    for compile in (False, True):
        model = build_model(cfg)
        names = set(model.state_dict())
        memory = MemoryConfig(compile=compile)
        parallelize(model, sharding_plan(cfg), Axes.alone(), ParallelConfig(zero_stage=0), memory)
        for block in (*model.double_blocks, *model.single_blocks):
            assert isinstance(block.forward, BlockForward)
            assert isinstance(block.forward.forward, CompiledForward) == compile
        assert set(model.state_dict()) == names


def test_linears_that_send_are_refused() -> None:
    memory = MemoryConfig(compile=True)
    with pytest.raises(ValueError, match=r"memory\.compile=true .* parallel\.tp=2; set"):
        check_compile(memory, ParallelConfig(tp=2))
    deepspeed = ParallelConfig(zero_engine=ZeroEngine.deepspeed, zero_stage=3)
    with pytest.raises(ValueError, match=r"memory\.compile=true .*zero_stage=3; set"):
        check_compile(memory, deepspeed)
    check_compile(MemoryConfig(), ParallelConfig(tp=2))
    check_compile(memory, ParallelConfig(cp_ring=2, cp_ulysses=2))
    check_compile(memory, replace(deepspeed, zero_stage=2))

"""One rank of any layout on tensors without values: what it saves, holds and holds at most."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from hunyuan_train.memory.config import MemoryConfig, Recompute
from hunyuan_train.memory.recompute import set_recompute
from hunyuan_train.memory.tracing import LiveBytes, SavedBytes
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.registry import build_model, sharding_plan
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import build_updates
from hunyuan_train.parallel.apply import parallelize
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import build_axes


@dataclass(frozen=True)
class Traced:
    """Bytes of rank 0."""

    saved: int
    """Kept by autograd after the forward, parameters aside."""
    states: int
    """Parameters, moments, average and, after the backward, gradients."""
    peak: int
    """The most at a time, states included."""


def traced(
    model: HunyuanConfig,
    parallel: ParallelConfig,
    world: int,
    grid: tuple[int, int, int],
    txt_tokens: int,
    batch: int,
    recompute: Recompute,
    count_saved: bool = True,
) -> Traced:
    """Run forward and backward of one micro-batch; ``grid`` is the latent (T, H, W).

    ``count_saved`` keeps what is saved alive a little longer, so the peak is another's matter.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        axes = build_axes(parallel, "cpu", world)
        live, fake = LiveBytes(), FakeTensorMode(allow_non_fake_inputs=True)
        with fake:
            module = build_model(model)
            memory = MemoryConfig() if recompute is not Recompute.none else None
            laid_out = parallelize(module, sharding_plan(model), axes, parallel, memory)
        set_recompute(module, recompute)
        _order_tokens(module, grid, txt_tokens)
        with fake, live:
            live.add(module.parameters())
            updates = build_updates(laid_out, parallel, OptimizerConfig())
            average = Ema(module, OptimizerConfig(), updates.local_weights())
            states = live.live_bytes
            dtype = getattr(torch, parallel.compute_dtype)
            inputs = (
                torch.empty(batch, model.in_channels, *grid, dtype=dtype),
                torch.empty(batch),
                torch.empty(batch, txt_tokens, model.text_dim, dtype=dtype),
                None,
                torch.empty(batch, model.pooled_dim, dtype=dtype),
                torch.empty(batch) if model.guidance_embed else None,
            )
            target = torch.empty(batch, model.out_channels, *grid)
            updates.start_micro_step(last=True)
            saved = SavedBytes(lambda: module.parameters() if count_saved else ())
            with saved if count_saved else nullcontext():
                predicted = module(*inputs)
            kept = saved.take()
            loss = (predicted.float() - target).square().sum()
            updates.backward(loss, last=True)
            gradients = sum(
                getattr(p.grad, "_local_tensor", p.grad).nbytes
                for p in module.parameters()
                if p.grad is not None
            )
            del average
        return Traced(kept, states + gradients, live.peak_bytes)
    finally:
        dist.destroy_process_group()


def _order_tokens(module: nn.Module, grid: tuple[int, int, int], txt_tokens: int) -> None:
    """Work out which rows are whose with real numbers, which tensors without values cannot."""
    if hasattr(module.tokens, "_cached_orders"):
        img_tokens = grid[0] * (grid[1] // 2) * (grid[2] // 2)
        module.tokens._cached_orders(img_tokens, txt_tokens, torch.device("cpu"))

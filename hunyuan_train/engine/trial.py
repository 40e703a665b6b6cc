"""A few real updates of a small model on made-up batches, to compare one layout with another."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import Batch
from hunyuan_train.data.config import FRAME_NAMES
from hunyuan_train.engine.build import init_weights, lay_out
from hunyuan_train.engine.state import TrainState
from hunyuan_train.engine.step import train_step
from hunyuan_train.memory.config import MemoryConfig, Recompute
from hunyuan_train.models.spec import InitKind, InitRule
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.updates import Updates, build_updates
from hunyuan_train.parallel.config import ParallelConfig
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.resilience.guard import Guard
from hunyuan_train.runtime.dist import World
from hunyuan_train.runtime.seed import keyed_normal

# Zero-initialised gates would hide everything behind them.
_RANDOM = InitRule(InitKind.NORMAL, 0.05)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The shape of one micro-batch of a trial."""

    bucket: Bucket
    text_lengths: tuple[int, ...]
    """Valid text tokens of each sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialResult:
    """What a trial computed; tensors are this rank's parts."""

    updates: Updates
    losses: list[float]
    norms: list[float]
    output: Tensor
    """Velocity of the first micro-batch of the first update, whole."""
    gradients: dict[str, Tensor]
    """Of the last update, clipped."""


def make_batch(cfg: RunConfig, shape: MicroBatch, number: int, text_length: int) -> Batch:
    """Return a batch whose numbers depend on ``number`` and the model's widths only."""
    model, samples = cfg.model, len(shape.text_lengths)
    frames, height, width = shape.bucket.latent_shape
    ids = [f"trial-{number}-{i}" for i in range(samples)]
    text = torch.stack([keyed_normal((text_length, model.text_dim), 0, "text", i) for i in ids])
    mask = torch.arange(text_length) < torch.tensor(shape.text_lengths)[:, None]
    latents = (model.out_channels, frames, height, width)
    return Batch(
        bucket=shape.bucket,
        sample_ids=ids,
        epochs=[0] * samples,
        mean=torch.stack([keyed_normal(latents, 0, "mean", i) for i in ids]),
        std=torch.full((samples, *latents), 0.1),
        stills=made_stills(latents, ids) if frames > 1 else None,
        still_frames=list(FRAME_NAMES) if frames > 1 else [],
        text=text * mask[..., None],
        text_mask=mask,
        pooled=torch.stack([keyed_normal((model.pooled_dim,), 0, "pooled", i) for i in ids]),
        empty_text=keyed_normal((text_length, model.text_dim), 0, "empty"),
        empty_mask=torch.arange(text_length) < 2,
        empty_pooled=keyed_normal((model.pooled_dim,), 0, "empty_pooled"),
        captions=[""] * samples,
        weight=1.0,
    )


def made_stills(latents: tuple[int, ...], ids: list[str]) -> Tensor:
    """Return made-up moments [B, 2, C, 2, h, w] of the first and last frames of a batch."""
    channels, _, *area = latents
    mean = torch.stack([keyed_normal((channels, 2, *area), 0, "stills", i) for i in ids])
    return torch.stack([mean, torch.full_like(mean, 0.1)], dim=1)


def run_trial(
    cfg: RunConfig, axes: Axes, world: World, shapes: list[MicroBatch], steps: int
) -> TrialResult:
    """Train ``steps`` updates through the engine that ``cfg`` names.

    Args:
        cfg: with the model to build; every parameter gets a random value.
        axes: this rank's place; ``Axes.alone()`` for a process that takes all batches.
        world: device and rank.
        shapes: the micro-batches of one global step, a multiple of the ranks with distinct data.
        steps: updates, each on new batches.
    """
    model, rules = lay_out(cfg, axes, world.device)
    updates = build_updates(model, cfg.parallel, cfg.optimizer, cfg.memory, cfg.run.seed)
    init_weights(updates, _nowhere_zero(rules), cfg.run.seed)
    gradients: dict[str, Tensor] = {}
    outputs: list[Tensor] = []
    updates.module.register_forward_hook(lambda *call: outputs.append(call[2].detach()))
    state = TrainState(
        model=model,
        updates=cast(Updates, _Recorder(updates, gradients)),
        ema=Ema(model.module, cfg.optimizer, updates.local_weights(), cfg.memory.ema),
        loader=None,  # pyright: ignore[reportArgumentType]  # batches are made here
        guard=Guard(cfg.resilience),
        skipped_updates=torch.zeros((), device=world.device),
    )
    losses, norms = [], []
    text_length = max(max(shape.text_lengths) for shape in shapes) + 2
    for step in range(steps):
        mine = range(axes.rank("dp"), len(shapes), axes.size("dp"))
        numbers = [(step * len(shapes) + i, shapes[i]) for i in mine]
        batches = [make_batch(cfg, shape, number, text_length) for number, shape in numbers]
        metrics = train_step(state, batches, cfg, world, 1.0)
        losses.append(metrics.loss.item())
        norms.append(metrics.grad_norm.item())
    return TrialResult(
        updates=updates, losses=losses, norms=norms, output=outputs[0], gradients=gradients
    )


def reference_config(cfg: RunConfig) -> RunConfig:
    """Return ``cfg`` for one process with torch alone, in float32 (float64 stays)."""
    dtype = "float64" if cfg.parallel.compute_dtype == "float64" else "float32"
    parallel = ParallelConfig(zero_stage=0, compute_dtype=dtype)
    return replace(cfg, parallel=parallel, memory=MemoryConfig(recompute=Recompute.none))


def _nowhere_zero(rules: Mapping[str, InitRule]) -> dict[str, InitRule]:
    return {n: _RANDOM if rule.kind is InitKind.ZEROS else rule for n, rule in rules.items()}


class _Recorder:
    """Passes everything on to the engine and keeps a copy of the gradients before the update."""

    def __init__(self, updates: Updates, gradients: dict[str, Tensor]) -> None:
        self._updates, self._gradients = updates, gradients

    def __getattr__(self, name: str) -> object:
        return getattr(self._updates, name)

    def step(self, norm: Tensor) -> Tensor:
        """Keep the gradients, then update."""
        self._gradients.update({n: g.clone() for n, g in self._updates.local_gradients().items()})
        return self._updates.step(norm)

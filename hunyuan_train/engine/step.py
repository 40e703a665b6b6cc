"""One optimizer update: micro-batches in, reduced numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.collate import MicroBatch
from hunyuan_train.engine.denoising import Denoising
from hunyuan_train.engine.state import TrainState, scheduled_rate
from hunyuan_train.engine.task import MicroStep, Task
from hunyuan_train.memory.recompute import BucketMode, set_recompute
from hunyuan_train.optim.updates import update_weights
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.runtime.device import Stopwatch
from hunyuan_train.runtime.dist import World


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMetrics:
    """Numbers of one update, over all ranks. Tensors are float32 scalars on the device."""

    loss: Tensor
    grad_norm: Tensor
    tokens: int
    samples: int
    flops: float
    """Of the model, forward and backward, and of the forwards of a teacher."""
    computed_flops: float
    """Those and what is computed again in the backward."""
    lr: float
    kind: str
    """Tokens of its largest sample over all ranks: losses are comparable within a kind."""
    micro_steps: list[MicroStep]
    """Of this rank alone; one that only kept ranks in step has no samples."""
    watch: Stopwatch
    """One stretch per entry of ``micro_steps``."""
    terms: dict[str, Tensor] = field(default_factory=dict)
    """What else the task has to show, over all ranks."""


class Marks(Protocol):
    """Where a step says what it does; see ``resilience.heartbeat``."""

    def phase(self, name: str, bucket: str = "") -> object:
        """Say what this rank does from now on."""
        ...


class _NoMarks:
    def phase(self, name: str, bucket: str = "") -> object:
        """Say nothing."""


NO_MARKS: Marks = _NoMarks()


class GlobalCounts(NamedTuple):
    """What a step has over all ranks with distinct data."""

    tokens: int
    loss_tokens: int
    """What the loss counts: some of these, or samples."""
    samples: int
    flops: float
    """Of the model, forward and backward."""
    computed_flops: float
    """Those and what is computed again."""
    kind: str
    """The image tokens of the largest sample."""


def global_counts(
    batches: Sequence[MicroBatch], modes: Sequence[BucketMode], task: Task, axes: Axes
) -> GlobalCounts:
    """Add up the work of a step, whose micro-batches keep their activations as ``modes`` say."""
    ranks, rank = axes.size("dp"), axes.rank("dp")
    # One row per rank, so that one sum also finds a maximum.
    counts = torch.zeros(ranks, 6, dtype=torch.float64)
    for batch, mode in zip(batches, modes, strict=True):
        if not batch.weight:  # only there because other ranks have one more
            continue
        samples, tokens = len(batch.sample_ids), batch.bucket.tokens
        work = task.work(batch, mode)
        row = [samples * tokens, work.counted, samples, work.flops, work.computed_flops]
        counts[rank, :5] += torch.tensor(row, dtype=torch.float64)
        counts[rank, 5] = max(counts[rank, 5].item(), tokens)
    counts = axes.sum(counts, "dp")
    tokens, counted, samples, flops, computed, _ = counts.sum(dim=0).tolist()
    kind = f"{int(counts[:, 5].max())} tokens"
    return GlobalCounts(int(tokens), int(counted), int(samples), flops, computed, kind)


def global_loss(losses: list[Tensor], tokens: int, axes: Axes) -> Tensor:
    """Return the mean loss over what all ranks count, to the last bit the same on each.

    Ranks that share a batch may round differently, and all have to refuse an update alike.
    """
    loss = axes.sum(torch.stack(losses).sum(), "dp") / tokens
    copies = axes.size("model")
    return axes.sum(loss, "model") / copies if copies > 1 else loss


def task_of(state: TrainState, cfg: RunConfig, world: World, scaling_factor: float) -> Task:
    """Return what the stage trains, by default the diffusion model."""
    if state.task is not None:
        return state.task
    return Denoising(cfg, world.device, scaling_factor, state.trained, state.teacher)


def train_step(
    state: TrainState,
    batches: Sequence[MicroBatch],
    cfg: RunConfig,
    world: World,
    scaling_factor: float,
    heart: Marks = NO_MARKS,
) -> StepMetrics:
    """Accumulate gradients over ``batches``, clip, update, follow with the EMA.

    The loss is the mean over what the task counts in the global batch, tokens or samples, whatever
    buckets the ranks hold: each rank back-propagates its sum over the global count, and gradients
    are summed. Ranks that share a batch compute the same loss. An update whose gradient norm is not
    finite is skipped on the device and counted.
    """
    updates, axes = state.updates, state.model.axes
    task = task_of(state, cfg, world, scaling_factor)
    modes = [
        state.modes.get(batch.bucket) or BucketMode.of(cfg.memory, str(batch.bucket))
        for batch in batches
    ]
    counts = global_counts(batches, modes, task, axes)
    tokens, kind = counts.loss_tokens, counts.kind
    state.lr = scheduled_rate(state, cfg)
    updates.set_learning_rate(state.lr)
    updates.start_update(state.step)
    task.start_update(state.step, state.lr / cfg.optimizer.lr)
    micro_steps: list[MicroStep] = []
    watch = Stopwatch(world.device)
    watch.mark()
    for number, (batch, mode) in enumerate(zip(batches, modes, strict=True), start=1):
        last = number == len(batches)
        heart.phase("forward", str(batch.bucket))
        updates.start_micro_step(last=last)
        set_recompute(state.model.module, mode.recompute, mode.offload)
        loss, part = task.forward(updates.module, batch, tokens)
        if cfg.memory.fused_backward:  # the only micro-step, whose backward updates the weights
            first = global_loss([loss.detach()], tokens, axes)
            updates.refuse(state.guard.screen(first, torch.zeros_like(first), kind))
        heart.phase("backward", str(batch.bucket))
        updates.backward(loss / tokens, last=last)
        micro_steps.append(part)
        watch.mark()
    heart.phase("update")
    norm = updates.clip(cfg.optimizer.clip_norm)
    loss = global_loss([part.loss_sum for part in micro_steps], tokens, axes)
    screened = state.guard.screen(loss, norm, kind)
    number = state.averaged_before + state.step
    state.skipped_updates += update_weights(updates, state.ema, screened, number)
    terms = task.finish(screened)
    state.step += 1
    state.samples += counts.samples
    state.tokens += counts.tokens
    return StepMetrics(
        loss=loss,
        grad_norm=norm,
        tokens=counts.tokens,
        samples=counts.samples,
        flops=counts.flops,
        computed_flops=counts.computed_flops,
        lr=state.lr,
        kind=kind,
        micro_steps=micro_steps,
        watch=watch,
        terms=terms,
    )

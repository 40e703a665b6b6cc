"""One optimizer update: micro-batches in, reduced numbers out."""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import Batch
from hunyuan_train.engine.inputs import ModelInputs, build_inputs, loss_tokens
from hunyuan_train.engine.state import TrainState, scheduled_rate
from hunyuan_train.engine.teacher import teacher_model
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.recompute import BucketMode, set_recompute
from hunyuan_train.objectives.loss import LossSum, flow_matching_loss
from hunyuan_train.observability.flops import ForwardFlops, dit_forward_flops
from hunyuan_train.optim.updates import update_weights
from hunyuan_train.parallel.mesh import Axes
from hunyuan_train.runtime.device import Stopwatch
from hunyuan_train.runtime.dist import World


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroStep:
    """What one micro-batch of this rank came to."""

    bucket: Bucket
    source: str
    samples: int
    tokens: int
    loss_sums: Tensor
    """[B] float32 on the device: the loss of each sample, summed over its tokens."""
    loss_tokens: int
    """Tokens in these sums: those the loss counts."""
    sample_ids: list[str]
    sigmas: Tensor
    """[B] float32 on the CPU: the noise level of each sample."""
    counted: Tensor
    """[B] float64 on the CPU: tokens of each sample that its loss counts."""

    @classmethod
    def of(cls, batch: Batch, loss: LossSum, x: ModelInputs) -> Self:
        """Count the samples of a batch, none if it has no weight."""
        ids = batch.sample_ids if batch.weight else []
        return cls(
            bucket=batch.bucket,
            source=batch.source,
            samples=len(ids),
            tokens=len(ids) * batch.bucket.tokens,
            loss_sums=(loss.samples.detach() * batch.weight)[: len(ids)],
            loss_tokens=loss.count if ids else 0,
            sample_ids=ids,
            sigmas=x.sigma[: len(ids)],
            counted=x.counted(batch.bucket.tokens)[: len(ids)],
        )

    @property
    def loss_sum(self) -> Tensor:
        """The loss summed over samples: a float32 scalar on the device."""
        return self.loss_sums.sum()


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


class Marks(Protocol):
    """Where a step says what it does; see ``resilience.heartbeat``."""

    def phase(self, name: str, bucket: str = "") -> object:
        """Say what this rank does from now on."""
        ...


class _NoMarks:
    def phase(self, name: str, bucket: str = "") -> object:
        """Say nothing."""


NO_MARKS: Marks = _NoMarks()


def training_flops(batch: Batch, cfg: RunConfig) -> int:
    """Return the model FLOPs of one micro-batch: forward, backward, and those of a teacher."""
    return forward_flops(batch, cfg).training + teacher_flops(batch, cfg)


def teacher_flops(batch: Batch, cfg: RunConfig) -> int:
    """Count both forwards of the teacher of a distillation, 0 without one."""
    if not cfg.objective.distill:
        return 0
    cfg = replace(cfg, model=teacher_model(cfg.model))
    empty = replace(batch, text_mask=batch.empty_mask[None])
    return forward_flops(batch, cfg).total + forward_flops(empty, cfg).total


def forward_flops(batch: Batch, cfg: RunConfig) -> ForwardFlops:
    """Count the forward pass of one micro-batch."""
    model = cfg.model
    return dit_forward_flops(
        batch=len(batch.sample_ids),
        img_tokens=batch.bucket.tokens,
        txt_tokens=int(batch.text_mask.sum(dim=1).max()),
        hidden_size=model.hidden_size,
        double_blocks=model.num_double_blocks,
        single_blocks=model.num_single_blocks,
        mlp_ratio=model.mlp_ratio,
        patch_in=model.in_channels * model.patch_volume,
        patch_out=model.out_channels * model.patch_volume,
        text_dim=model.text_dim,
        pooled_dim=model.pooled_dim,
        refiner_depth=model.refiner_depth,
        guidance_embed=model.guidance_embed,
    )


class GlobalCounts(NamedTuple):
    """What a step has over all ranks with distinct data."""

    tokens: int
    loss_tokens: int
    """Those the loss counts."""
    samples: int
    flops: float
    """Of the model, forward and backward."""
    computed_flops: float
    """Those and what is computed again."""
    kind: str
    """The image tokens of the largest sample."""


def global_counts(
    batches: list[Batch],
    modes: list[BucketMode],
    cfg: RunConfig,
    axes: Axes,
    trained: float = 1.0,
) -> GlobalCounts:
    """Add up the work of a step, whose micro-batches keep their activations as ``modes`` say.

    Frozen weights, all but the share ``trained``, have no gradient: one product of three less.
    """
    ranks, rank = axes.size("dp"), axes.rank("dp")
    # One row per rank, so that one sum also finds a maximum.
    counts = torch.zeros(ranks, 6, dtype=torch.float64)
    for batch, mode in zip(batches, modes, strict=True):
        if not batch.weight:  # only there because other ranks have one more
            continue
        samples, tokens = len(batch.sample_ids), batch.bucket.tokens
        flops = forward_flops(batch, cfg)
        other = teacher_flops(batch, cfg) - (1 - trained) * (flops.linear - flops.of_mask)
        computed = flops.computed(
            linear_again=mode.recompute is not Recompute.none,
            attention_again=mode.recompute is Recompute.full,
        )
        counted = loss_tokens(batch, cfg)
        row = [samples * tokens, counted, samples, flops.training + other, computed + other]
        counts[rank, :5] += torch.tensor(row, dtype=torch.float64)
        counts[rank, 5] = max(counts[rank, 5].item(), tokens)
    counts = axes.sum(counts, "dp")
    tokens, counted, samples, flops, computed, _ = counts.sum(dim=0).tolist()
    kind = f"{int(counts[:, 5].max())} tokens"
    return GlobalCounts(int(tokens), int(counted), int(samples), flops, computed, kind)


def global_loss(losses: list[Tensor], tokens: int, axes: Axes) -> Tensor:
    """Return the mean loss over the tokens of all ranks, to the last bit the same on each.

    Ranks that share a batch may round differently, and all have to refuse an update alike.
    """
    loss = axes.sum(torch.stack(losses).sum(), "dp") / tokens
    copies = axes.size("model")
    return axes.sum(loss, "model") / copies if copies > 1 else loss


def train_step(
    state: TrainState,
    batches: list[Batch],
    cfg: RunConfig,
    world: World,
    scaling_factor: float,
    heart: Marks = NO_MARKS,
) -> StepMetrics:
    """Accumulate gradients over ``batches``, clip, update, follow with the EMA.

    The loss is the mean over the tokens of the global batch, whatever buckets the ranks hold: each
    rank back-propagates its loss sum over the global token count, and gradients are summed. Ranks
    that share a batch compute the same loss. An update whose gradient norm is not finite is skipped
    on the device and counted.
    """
    updates, axes = state.updates, state.model.axes
    modes = [
        state.modes.get(batch.bucket) or BucketMode.of(cfg.memory, str(batch.bucket))
        for batch in batches
    ]
    counts = global_counts(batches, modes, cfg, axes, state.trained)
    tokens, kind = counts.loss_tokens, counts.kind
    state.lr = scheduled_rate(state, cfg)
    updates.set_learning_rate(state.lr)
    updates.start_update(state.step)
    micro_steps: list[MicroStep] = []
    watch = Stopwatch(world.device)
    watch.mark()
    for number, (batch, mode) in enumerate(zip(batches, modes, strict=True), start=1):
        last = number == len(batches)
        heart.phase("forward", str(batch.bucket))
        updates.start_micro_step(last=last)
        set_recompute(state.model.module, mode.recompute, mode.offload)
        x = build_inputs(batch, cfg, scaling_factor, world.device)
        if state.teacher is not None:
            x = replace(x, target=state.teacher.target(x))
        predicted = updates.module(*x.arguments())
        parts = flow_matching_loss(predicted, x.target, weights=x.weights, given=x.given)
        loss = parts.sum * batch.weight
        if cfg.memory.fused_backward:  # the only micro-step, whose backward updates the weights
            first = global_loss([loss.detach()], tokens, axes)
            updates.refuse(state.guard.screen(first, torch.zeros_like(first), kind))
        heart.phase("backward", str(batch.bucket))
        updates.backward(loss / tokens, last=last)
        micro_steps.append(MicroStep.of(batch, parts, x))
        watch.mark()
    heart.phase("update")
    norm = updates.clip(cfg.optimizer.clip_norm)
    loss = global_loss([part.loss_sum for part in micro_steps], tokens, axes)
    screened = state.guard.screen(loss, norm, kind)
    number = state.averaged_before + state.step
    state.skipped_updates += update_weights(updates, state.ema, screened, number)
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
    )

"""The diffusion transformer as the task of a stage: noisy latents in, the loss of its velocity."""

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.collate import Batch, MicroBatch
from hunyuan_train.engine.inputs import ModelInputs, build_inputs, loss_tokens
from hunyuan_train.engine.task import MicroStep, Work
from hunyuan_train.engine.teacher import Teacher, teacher_model
from hunyuan_train.memory.config import Recompute
from hunyuan_train.memory.recompute import BucketMode
from hunyuan_train.objectives.loss import LossSum, flow_matching_loss
from hunyuan_train.observability.flops import ForwardFlops, dit_forward_flops


class Denoising:
    """See :class:`~hunyuan_train.engine.task.Task`.

    Args:
        cfg: Of the run.
        device: Where the model is.
        scaling_factor: Of the latents.
        trained: Trained parameters over all: frozen ones have no gradient.
        teacher: Who says what to predict, instead of the data.
    """

    def __init__(
        self,
        cfg: RunConfig,
        device: torch.device,
        scaling_factor: float,
        trained: float = 1.0,
        teacher: Teacher | None = None,
    ) -> None:
        self._cfg, self._device, self._scale = cfg, device, scaling_factor
        self._trained, self._teacher = trained, teacher

    def work(self, batch: MicroBatch, mode: BucketMode) -> Work:
        """Count a micro-batch; frozen weights have no gradient: one product of three less."""
        batch = cast(Batch, batch)
        flops = forward_flops(batch, self._cfg)
        other = teacher_flops(batch, self._cfg) - (1 - self._trained) * (
            flops.linear - flops.of_mask
        )
        computed = flops.computed(
            linear_again=mode.recompute is not Recompute.none,
            attention_again=mode.recompute is Recompute.full,
        )
        return Work(
            counted=loss_tokens(batch, self._cfg),
            flops=flops.training + other,
            computed_flops=computed + other,
        )

    def start_update(self, step: int, rate: float) -> None:
        """Do nothing: every update is alike."""

    def forward(self, module: nn.Module, batch: MicroBatch, total: int) -> tuple[Tensor, MicroStep]:
        """Compute a micro-batch; the loss is summed over the tokens that count."""
        batch = cast(Batch, batch)
        x = build_inputs(batch, self._cfg, self._scale, self._device)
        if self._teacher is not None:
            x = replace(x, target=self._teacher.target(x))
        predicted = module(*x.arguments())
        parts = flow_matching_loss(predicted, x.target, weights=x.weights, given=x.given)
        return parts.sum * batch.weight, micro_step(batch, parts, x)

    def finish(self, norm: Tensor) -> dict[str, Tensor]:
        """Do nothing: nothing else learns."""
        return {}

    def tensors(self) -> dict[str, Any]:
        """Return nothing: there is only the model."""
        return {}

    def reset(self) -> None:
        """Do nothing."""


def micro_step(batch: Batch, loss: LossSum, x: ModelInputs) -> MicroStep:
    """Count the samples of a batch, none if it has no weight."""
    ids = batch.sample_ids if batch.weight else []
    return MicroStep(
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

"""What a stage trains, as an update sees it: work to count, a loss, numbers to show."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import MicroBatch
from hunyuan_train.memory.recompute import BucketMode

NO_LEVELS = torch.zeros(0)


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroStep:
    """What one micro-batch of this rank came to."""

    bucket: Bucket
    source: str
    samples: int
    tokens: int
    loss_sums: Tensor
    """[B] float32 on the device: the loss of each sample, times what it counts."""
    loss_tokens: int
    """What these sums count: tokens, or samples."""
    sample_ids: list[str]
    sigmas: Tensor = NO_LEVELS
    """[B] float32 on the CPU: the noise level of each sample; empty where there is none."""
    counted: Tensor = NO_LEVELS
    """[B] float64 on the CPU: tokens of each sample that its loss counts; empty without noise."""

    @property
    def loss_sum(self) -> Tensor:
        """The loss summed over samples: a float32 scalar on the device."""
        return self.loss_sums.sum()


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What one micro-batch has to be counted with, before it is computed."""

    counted: int
    """What its loss is a sum over."""
    flops: float
    """Of the model, forward and backward, and of what only says what to learn."""
    computed_flops: float
    """Those and what is computed again."""


class Task(Protocol):
    """What one stage trains."""

    def work(self, batch: MicroBatch, mode: BucketMode) -> Work:
        """Count a micro-batch whose activations are kept as ``mode`` says."""
        ...

    def start_update(self, step: int, rate: float) -> None:
        """Say how many updates are done, and the learning rate over its highest."""
        ...

    def forward(self, module: nn.Module, batch: MicroBatch, total: int) -> tuple[Tensor, MicroStep]:
        """Compute a micro-batch.

        Args:
            module: The model as laid out.
            batch: Its samples.
            total: What the losses of all ranks and micro-batches of the update count.

        Returns:
            A scalar whose gradient, over ``total``, is this batch's part of the update's; and what
            there is to show of it. Without the batch's weight both are zero.
        """
        ...

    def finish(self, norm: Tensor) -> dict[str, Tensor]:
        """Update whatever learns beside the model, unless ``norm`` is not finite.

        Returns:
            Numbers of the update to show, over all ranks: scalars on the device.
        """
        ...

    def tensors(self) -> dict[str, Any]:
        """Return live tensors to save beside the model, by section."""
        ...

    def reset(self) -> None:
        """Set them to what a fresh run has."""
        ...

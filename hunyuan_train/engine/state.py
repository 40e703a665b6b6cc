"""What survives a restart, and nothing else."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.optim.ema import Ema
from hunyuan_train.parallel.zero import load_optimizer_state, optimizer_state


@dataclass(kw_only=True)
class TrainState:
    """The state of one training stage. All randomness is keyed, so no generator state is here."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    loader: BucketLoader
    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_updates: int = 0

    def tensors(self) -> dict[str, Any]:
        """Return the tensors to save, sharded as they are; filling them in place restores them."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": optimizer_state(self.model, self.optimizer),
        }

    def counters(self) -> dict[str, Any]:
        """Return everything that is not a tensor, ready for JSON."""
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "skipped_updates": self.skipped_updates,
            "loader": self.loader.state_dict(),
        }

    def load(self, tensors: dict[str, Any], counters: dict[str, Any]) -> None:
        """Take over restored ``tensors`` and ``counters``."""
        self.model.load_state_dict(tensors["model"])
        self.ema.load_state_dict(tensors["ema"])
        load_optimizer_state(self.model, self.optimizer, tensors["optimizer"])
        self.step = counters["step"]
        self.samples = counters["samples"]
        self.tokens = counters["tokens"]
        self.skipped_updates = counters["skipped_updates"]
        self.loader.load_state_dict(counters["loader"])

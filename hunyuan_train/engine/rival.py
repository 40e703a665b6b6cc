"""The discriminator a VAE is trained against, its updates, and how loud its verdict is."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.memory.config import MemoryConfig
from hunyuan_train.models.vae.discriminator import PatchDiscriminator
from hunyuan_train.objectives.vae_loss import (
    adaptive_ratio,
    adversarial_term,
    discriminator_loss,
    gradient_penalty,
)
from hunyuan_train.optim.config import OptimizerConfig, Rule
from hunyuan_train.optim.updates import TorchUpdates
from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.parallel.config import ZeroEngine
from hunyuan_train.parallel.mesh import Axes


class Rival:
    """Every rank holds all of the discriminator; its gradients are summed over ranks.

    With ``vae_loss.adaptive`` the verdict is scaled by the ratio of the gradients of the other
    terms and of it, in pixels, over the whole update before: then the weight depends neither on the
    number of ranks nor on the order of micro-batches. In the first update that counts it is 0.

    Args:
        cfg: Of the run.
        axes: This rank's place.
        device: Where the discriminator goes.
    """

    def __init__(self, cfg: RunConfig, axes: Axes, device: torch.device) -> None:
        self._cfg, self._axes, self._device = cfg, axes, device
        loss = cfg.vae_loss
        self.module = PatchDiscriminator(loss.discriminator).to(device)
        self.module.to(memory_format=torch.channels_last_3d)  # pyright: ignore[reportCallIssue]
        self._recipe = OptimizerConfig(
            rule=Rule.adamw,
            lr=loss.discriminator_lr,
            beta1=loss.discriminator_beta1,
            beta2=0.9,
            weight_decay=0.0,
            warmup_steps=0,
        )
        whole = replace(cfg.parallel, zero_stage=0, zero_engine=ZeroEngine.torch)
        model = ParallelModel(self.module, axes, {}, frozenset())
        self._updates = TorchUpdates(model, whole, self._recipe, MemoryConfig(), cfg.run.seed)
        self._loudness = torch.zeros((), device=device)
        self._squares = torch.zeros(2, dtype=torch.float64, device=device)
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)
        self._active = False
        self.reset()

    def start_update(self, step: int, rate: float) -> None:
        """Say how many updates are done, and the learning rate over its highest."""
        self._active = step >= self._cfg.vae_loss.adversarial_start
        self._updates.set_learning_rate(rate * self._recipe.lr)
        self._updates.start_update(step)

    def judge(
        self, decoded: Tensor, pixels: Tensor, wanted: Tensor, weight: float, total: int
    ) -> Tensor | float:
        """Learn from a micro-batch; return the gradient of the verdict, to be added to the others.

        Args:
            decoded: [B, 3, F, H, W] float32, a leaf that has a gradient.
            pixels: The same of the recordings.
            wanted: Gradient of the other terms, summed over samples.
            weight: Of the batch.
            total: Samples of the whole update.
        """
        if not self._active:
            return 0.0
        loss = self._cfg.vae_loss
        verdict = adversarial_term(self.module(decoded))
        (slope,) = torch.autograd.grad(verdict.sum() * weight, decoded)
        self._squares += torch.stack(
            [wanted.double().square().sum(), slope.double().square().sum()]
        )
        each = discriminator_loss(self.module(pixels), self.module(decoded.detach()))
        if loss.gradient_penalty:
            each = each + loss.gradient_penalty * gradient_penalty(self.module, pixels)
        # Ranks that share a batch all compute it, and their gradients are summed.
        share = weight / (total * self._axes.size("model"))
        self._updates.start_micro_step(last=True)
        self._updates.backward(each.sum() * share, last=True)
        samples = len(decoded) * float(bool(weight))
        values = [verdict.sum() * weight, each.sum() * weight]
        self._sums += torch.stack([v.detach().double() for v in values] + [
            self._squares.new_tensor(samples)
        ])  # fmt: skip
        louder = self._loudness if loss.adaptive else 1.0
        return loss.adversarial * louder * slope

    def update(self, norm: Tensor) -> dict[str, Tensor]:
        """Update unless ``norm`` is not finite; return what there is to show, over all ranks."""
        if not self._active:
            return {}
        own = self._updates.clip(self._cfg.optimizer.clip_norm)
        self._updates.step(torch.where(torch.isfinite(norm), own, torch.full_like(own, torch.nan)))
        squares = self._axes.sum(self._squares, "dp")
        ratio = adaptive_ratio(squares, self._cfg.vae_loss.adaptive_most)
        self._loudness.copy_(torch.where(torch.isfinite(norm), ratio.float(), self._loudness))
        sums = self._axes.sum(self._sums, "dp")
        self._squares, self._sums = torch.zeros_like(squares), torch.zeros_like(sums)
        count = sums[2].clamp(min=1)
        return {
            "adversarial": sums[0] / count,
            "discriminator": sums[1] / count,
            "adversarial_weight": self._loudness.double() * self._cfg.vae_loss.adversarial,
        }

    def tensors(self) -> dict[str, Any]:
        """Return the live tensors by section of a checkpoint."""
        return {
            "discriminator": self._updates.local_weights(),
            "discriminator_optimizer": self._updates.local_moments(),
            "adversarial": {"loudness": self._loudness},
        }

    def reset(self) -> None:
        """Draw the first weights, the same on every rank."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self._cfg.run.seed)
            fresh = PatchDiscriminator(self._cfg.vae_loss.discriminator)
            fresh.init_weights()
        self.module.load_state_dict(fresh.state_dict())
        for moments in self._updates.local_moments().values():
            for tensor in moments.values():
                tensor.zero_()
        self._loudness.zero_()

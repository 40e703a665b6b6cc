"""From gradients to new weights, with torch's sharding or another engine behind one interface."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from hunyuan_train.memory.config import MemoryConfig
from hunyuan_train.models.lora import saved_parameters
from hunyuan_train.optim.apex import ApexAdamW
from hunyuan_train.optim.choices import ONE_MICRO_STEP, check_choices
from hunyuan_train.optim.clip import clip_grad_norm, local_part
from hunyuan_train.optim.config import Implementation, OptimizerConfig, Rule
from hunyuan_train.optim.ema import Ema
from hunyuan_train.optim.fused_backward import FusedBackward
from hunyuan_train.optim.groups import build_optimizer
from hunyuan_train.optim.lean import LeanAdamW, needs_lean
from hunyuan_train.optim.muon import MuonAdamW
from hunyuan_train.optim.plain import PlainAdamW
from hunyuan_train.optim.unfreezing import Unfreezing
from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.parallel.config import ParallelConfig, ZeroEngine
from hunyuan_train.parallel.gradients import finish_gradients
from hunyuan_train.parallel.view import rows_view
from hunyuan_train.parallel.zero import is_sharded, set_micro_step
from hunyuan_train.runtime.dist import ranks_in_world


class Updates(Protocol):
    """One update: ``start_update``; micro-batches; ``clip``; ``step``.

    A micro-batch is ``start_micro_step``, forward, ``backward``. Gradients are sums: the loss of
    every rank is already divided by the tokens of all ranks.
    """

    module: nn.Module
    """What the forward calls."""

    def start_update(self, done: int) -> None:
        """Say how many updates are done: some parameters may be trained from now on only."""
        ...

    def start_micro_step(self, *, last: bool) -> None:
        """Prepare a forward; ``last`` says that the update follows its backward."""
        ...

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of this rank's share of the global loss."""
        ...

    def clip(self, max_norm: float) -> Tensor:
        """Finish the sums over ranks, clip, and return the global norm before clipping."""
        ...

    def step(self, norm: Tensor) -> Tensor:
        """Update unless the norm is not finite, drop the gradients; return 1.0 if skipped."""
        ...

    def carry(self, ema: Ema, number: int) -> bool:
        """Take the moving average along in the next ``step``, if it can; see ``update_weights``."""
        ...

    def refuse(self, norm: Tensor) -> None:
        """Before a backward that updates: leave the weights alone where ``norm`` is not finite."""
        ...

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next update."""
        ...

    def local_weights(self) -> dict[str, Tensor]:
        """Return this rank's live parts of the weights, maybe empty, by name."""
        ...

    def local_moments(self) -> dict[str, dict[str, Tensor]]:
        """Return this rank's live optimizer state by parameter name."""
        ...

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """Return a part of parameter ``name`` as a checkpoint sees it: some boxes of the whole."""
        ...

    def weights_changed(self) -> None:
        """Bring the module in line after ``local_weights`` were overwritten."""
        ...

    def local_gradients(self) -> dict[str, Tensor]:
        """Return this rank's parts of the gradients, after ``clip`` and before ``step``."""
        ...


class TorchUpdates:
    """AdamW or Muon over plain or ``fully_shard`` parameters; see ``Updates``."""

    def __init__(
        self,
        model: ParallelModel,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        memory: MemoryConfig,
        seed: int,
    ) -> None:
        self.module = model.module
        self._model, self._parallel = model, parallel
        tp = model.axes.size("tp")
        self._named = saved_parameters(model.module)
        self._cuts = [tp if name in model.slices else 1 for name in self._named]
        # fully_shard averages over its ranks; gradients here are sums.
        self._loss_factor = model.axes.size("grads") if is_sharded(model.module) else 1
        self._in_backward: FusedBackward | None = None
        self._fusing = False
        self._factor: Tensor | None = None
        self._average: tuple[Mapping[str, Tensor] | None, float] = None, 0.0
        self._unfreezing = Unfreezing(self._named, optimizer)
        self._unfreezing.apply(self._named)
        self._frozen = self._unfreezing.frozen(0)
        if optimizer.rule is Rule.muon:
            self._rule = MuonAdamW(model.module, optimizer)
            return
        if not needs_lean(memory):
            apex = optimizer.implementation is Implementation.apex
            self._rule = (ApexAdamW if apex else PlainAdamW)(model.module, optimizer)
            return
        trainable = {name: p for name, p in self._named.items() if p.requires_grad}
        self._rule = LeanAdamW(trainable, optimizer, memory, seed)
        if memory.fused_backward:
            self._in_backward = FusedBackward(
                trainable, self._rule.update, lambda name: name in self._frozen
            )

    def start_update(self, done: int) -> None:
        """Look up what the next update leaves alone."""
        self._frozen = self._unfreezing.frozen(done)

    def start_micro_step(self, *, last: bool) -> None:
        """Tell the sharding when to reduce.

        Raises:
            ValueError: updates happen in the backward, and this is not the only one.
        """
        if self._in_backward is not None and not last:
            raise ValueError(ONE_MICRO_STEP)
        set_micro_step(self.module, self._parallel, last)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of this rank's share of the global loss."""
        (loss * self._loss_factor).backward()

    def clip(self, max_norm: float) -> Tensor:
        """Finish the sums over ranks, clip, and return the global norm before clipping."""
        if self._in_backward is not None:
            return self._in_backward.norm()
        for name in self._frozen:
            self._named[name].grad = None
        finish_gradients(self._model)
        self._fusing = isinstance(self._rule, PlainAdamW) and self._rule.fuses()
        norm = clip_grad_norm(self._named.values(), 0.0 if self._fusing else max_norm, self._cuts)
        if self._fusing and max_norm > 0:
            self._factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        return norm

    def carry(self, ema: Ema, number: int) -> bool:
        """Take the moving average along in the next ``step`` if that runs the fused kernel."""
        averages = ema.lend() if self._fusing else None
        if averages is not None and isinstance(self._rule, PlainAdamW):
            # The average of what is never updated follows too, and the kernel does not see it.
            averages = averages if averages.keys() == self._rule.names() else None
        self._average = averages, ema.decay(number)
        return averages is not None

    def step(self, norm: Tensor) -> Tensor:
        """Update unless the norm is not finite, drop the gradients; return 1.0 if skipped."""
        factor, self._factor = self._factor, None
        (averages, decay), self._average = self._average, (None, 0.0)
        fusing, self._fusing = self._fusing, False
        if fusing and isinstance(self._rule, PlainAdamW):
            return self._rule.fused_step(norm, factor, averages, decay)
        return self._rule.step(norm)

    def refuse(self, norm: Tensor) -> None:
        """Leave the weights alone in the next backward where ``norm`` is not finite."""
        if self._in_backward is not None:
            self._in_backward.refuse(norm)

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next update."""
        self._rule.set_learning_rate(lr)

    def local_weights(self) -> dict[str, Tensor]:
        """Return the live parameters."""
        return {name: p.detach() for name, p in self._named.items()}

    def local_moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the live moments and step counts; those without a DTensor are local rows."""
        return self._rule.tensors()

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as boxes of the whole if it is a part that does not say so itself."""
        return self._model.view(name, rows_view(tensor, self._named[name]))

    def weights_changed(self) -> None:
        """Do nothing: the parameters are the weights."""

    def local_gradients(self) -> dict[str, Tensor]:
        """Return the live gradients, plain or DTensor, clipped by now."""
        grads = {n: p.grad for n, p in self._named.items() if p.grad is not None}
        if self._factor is not None:
            torch._foreach_mul_([local_part(grad) for grad in grads.values()], self._factor)
            self._factor = None
        return grads


def update_weights(updates: Updates, ema: Ema, norm: Tensor, number: int) -> Tensor:
    """Update, and move the average: inside the update where that can, else after it.

    This is the one place that decides which. After a skipped update the first leaves the average
    alone; the second moves it towards the weights as they still are.

    Args:
        updates: With the gradients clipped.
        ema: Of its weights.
        norm: Of the gradients; not finite to leave the weights alone.
        number: Of the update, 0 for the first.

    Returns:
        1.0 if the update was skipped, else 0.0.
    """
    carried = updates.carry(ema, number)
    skipped = updates.step(norm)
    if not carried:
        ema.update(number)
    return skipped


def viewed(updates: Updates, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by parameter name as a checkpoint sees them."""
    return {name: updates.view(name, tensor) for name, tensor in tensors.items()}


def build_updates(
    model: ParallelModel,
    parallel: ParallelConfig,
    optimizer: OptimizerConfig,
    memory: MemoryConfig | None = None,
    seed: int = 0,
) -> Updates:
    """Return the updates of the engine that ``parallel.zero_engine`` names.

    The weights may have no values yet: fill them afterwards.

    Args:
        model: The model, laid out with the same ``parallel`` and ``memory``.
        parallel: Which engine.
        optimizer: Hyperparameters.
        memory: What weights and moments are kept in; all float32 on the device by default.
        seed: Of the run, for rounding at random.

    Raises:
        ValueError: the engine or another package is not installed, or choices do not go together.
    """
    memory = memory or MemoryConfig()
    check_choices(memory, optimizer, parallel, 1 if model.axes.mesh is None else ranks_in_world())
    if parallel.zero_engine is ZeroEngine.torch:
        return TorchUpdates(model, parallel, optimizer, memory, seed)
    from hunyuan_train.parallel.engines.deepspeed_build import build_deepspeed

    return build_deepspeed(
        model.module,
        lambda module: build_optimizer(module, optimizer),
        parallel,
        model.axes,
        model.slices,
        partial=model.partial,
    )

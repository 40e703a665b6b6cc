"""From gradients to new weights, with torch's sharding or another engine behind one interface."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor, nn

from hunyuan_train.optim.clip import clip_grad_norm
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.groups import build_optimizer, optimizer_tensors, step_if_finite
from hunyuan_train.optim.schedule import set_learning_rate
from hunyuan_train.parallel.apply import ParallelModel
from hunyuan_train.parallel.config import ParallelConfig, ZeroEngine
from hunyuan_train.parallel.gradients import finish_gradients
from hunyuan_train.parallel.zero import is_sharded, set_micro_step


class Updates(Protocol):
    """One update: ``start_micro_step``, forward, ``backward`` per micro-batch; ``clip``; ``step``.

    Gradients are sums: the loss of every rank is already divided by the tokens of all ranks.
    """

    module: nn.Module
    """What the forward calls."""

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

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next update."""
        ...

    def local_weights(self) -> dict[str, Tensor]:
        """Return this rank's live parts of the float32 weights, maybe empty, by name."""
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
    """AdamW over plain or ``fully_shard`` parameters; see ``Updates``."""

    def __init__(
        self, model: ParallelModel, parallel: ParallelConfig, optimizer: OptimizerConfig
    ) -> None:
        self.module = model.module
        self._model, self._parallel = model, parallel
        self._optimizer = build_optimizer(model.module, optimizer)
        tp = model.axes.size("tp")
        named = list(model.module.named_parameters())
        self._params = [p for _, p in named]
        self._cuts = [tp if name in model.slices else 1 for name, _ in named]
        # fully_shard averages over its ranks; gradients here are sums.
        self._loss_factor = model.axes.size("grads") if is_sharded(model.module) else 1

    def start_micro_step(self, *, last: bool) -> None:
        """Tell the sharding when to reduce."""
        set_micro_step(self.module, self._parallel, last)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradients of this rank's share of the global loss."""
        (loss * self._loss_factor).backward()

    def clip(self, max_norm: float) -> Tensor:
        """Finish the sums over ranks, clip, and return the global norm before clipping."""
        finish_gradients(self._model)
        return clip_grad_norm(self._params, max_norm, self._cuts)

    def step(self, norm: Tensor) -> Tensor:
        """Update unless the norm is not finite, drop the gradients; return 1.0 if skipped."""
        skipped = step_if_finite(self._optimizer, norm)
        self._optimizer.zero_grad(set_to_none=True)
        return skipped

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next update."""
        set_learning_rate(self._optimizer, lr)

    def local_weights(self) -> dict[str, Tensor]:
        """Return the live parameters."""
        return {name: p.detach() for name, p in self.module.named_parameters()}

    def local_moments(self) -> dict[str, dict[str, Tensor]]:
        """Return the live moments and step counts."""
        return optimizer_tensors(self._optimizer)

    def view(self, name: str, tensor: Tensor) -> Tensor:
        """Return ``tensor`` as boxes of the whole if tensor parallelism cut it, else as it is."""
        return self._model.view(name, tensor)

    def weights_changed(self) -> None:
        """Do nothing: the parameters are the weights."""

    def local_gradients(self) -> dict[str, Tensor]:
        """Return the live gradients, plain or DTensor."""
        return {n: p.grad for n, p in self.module.named_parameters() if p.grad is not None}


def viewed(updates: Updates, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by parameter name as a checkpoint sees them."""
    return {name: updates.view(name, tensor) for name, tensor in tensors.items()}


def build_updates(
    model: ParallelModel, parallel: ParallelConfig, optimizer: OptimizerConfig
) -> Updates:
    """Return the updates of the engine that ``parallel.zero_engine`` names.

    The weights may have no values yet: fill them afterwards.

    Raises:
        ValueError: the engine is not installed.
    """
    if parallel.zero_engine is ZeroEngine.torch:
        return TorchUpdates(model, parallel, optimizer)
    from hunyuan_train.parallel.engines.deepspeed_build import build_deepspeed

    return build_deepspeed(
        model.module,
        lambda module: build_optimizer(module, optimizer),
        parallel,
        model.axes,
        model.slices,
        partial=model.partial,
    )

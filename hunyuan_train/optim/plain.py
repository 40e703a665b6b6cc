"""``torch.optim.AdamW``, or the same numbers and the moving average in one fused pass."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hunyuan_kernels import adamw_ema, dispatch
from hunyuan_train.optim.clip import local_part
from hunyuan_train.optim.config import Implementation, OptimizerConfig
from hunyuan_train.optim.groups import build_optimizer, optimizer_tensors, step_if_finite
from hunyuan_train.optim.schedule import set_learning_rate


class PlainAdamW:
    """AdamW with all states in float32 beside the weights."""

    def __init__(self, model: nn.Module, cfg: OptimizerConfig) -> None:
        """Build it over the trainable parameters of ``model``."""
        self._optimizer, self._cfg = build_optimizer(model, cfg), cfg

    def fuses(self) -> bool:
        """Return whether :meth:`fused_step` runs: there is a kernel, and all gradients are."""
        if self._cfg.implementation is Implementation.torch:
            return False
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        return all(
            param.grad is not None
            and (part.numel() == 0 or dispatch.enabled("adamw_ema", part))
            and part.dtype is torch.float32
            and part.is_contiguous()
            for param, part in ((p, local_part(p.detach())) for p in params)
        )

    def names(self) -> set[str]:
        """Return the names of the parameters it updates."""
        return {name for group in self._optimizer.param_groups for name in group["param_names"]}

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next updates."""
        set_learning_rate(self._optimizer, lr)

    def step(self, norm: Tensor) -> Tensor:
        """Update unless ``norm`` is not finite, drop the gradients; return 1.0 if skipped."""
        skipped = step_if_finite(self._optimizer, norm)
        self._optimizer.zero_grad(set_to_none=True)
        return skipped

    def fused_step(
        self,
        norm: Tensor,
        factor: Tensor | None,
        averages: Mapping[str, Tensor] | None,
        decay: float,
    ) -> Tensor:
        """Do the same in one pass, with the gradients times ``factor``, and move the averages.

        Args:
            norm: As in :meth:`step`.
            factor: Scalar on the device, from clipping; None is 1.
            averages: Local parts of the moving average by name, or None; a skipped update leaves
                them alone.
            decay: Share of the average that is kept.
        """
        skipped = (~torch.isfinite(norm)).to(torch.float32)
        for group in self._optimizer.param_groups:
            params = group["params"]
            states = [self._optimizer.state[param] for param in params]
            adamw_ema(
                [local_part(param.detach()) for param in params],
                [local_part(param.grad) for param in params],
                [local_part(state["exp_avg"]) for state in states],
                [local_part(state["exp_avg_sq"]) for state in states],
                [state["step"] for state in states],
                [averages[name] for name in group["param_names"]] if averages else [],
                skip=skipped,
                grad_factor=factor,
                lr=group["lr"],
                beta1=self._cfg.beta1,
                beta2=self._cfg.beta2,
                eps=self._cfg.eps,
                weight_decay=group["weight_decay"],
                ema_decay=decay,
            )
        self._optimizer.zero_grad(set_to_none=True)
        return skipped

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the live state by parameter name."""
        return optimizer_tensors(self._optimizer)

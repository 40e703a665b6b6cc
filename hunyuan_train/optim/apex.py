"""FusedAdam of NVIDIA's apex, where it is installed and asked for.

It takes plain tensors, so it gets this rank's parts of the parameters. It counts the updates of a
group on the host, therefore the host has to know whether an update is skipped, and waits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hunyuan_train.optim.clip import local_part
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.groups import named_groups


class ApexAdamW:
    """FusedAdam over trainable parameters, plain or DTensor, with its state from the start."""

    def __init__(self, model: nn.Module, cfg: OptimizerConfig) -> None:
        """Build it over the trainable parameters of ``model``.

        Raises:
            ValueError: apex is not installed with its CUDA extensions, or nothing can be trained.
        """
        groups = named_groups(model, cfg)
        self._named = [pair for group in groups for pair in group["params"]]
        parts = {name: nn.Parameter(local_part(param.detach())) for name, param in self._named}
        try:
            from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]

            self._optimizer: Any = FusedAdam(
                [
                    group | {"params": [parts[name] for name, _ in group["params"]]}
                    for group in groups
                ],
                lr=cfg.lr,
                betas=(cfg.beta1, cfg.beta2),
                eps=cfg.eps,
                adam_w_mode=True,
            )
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"optimizer.implementation=apex needs NVIDIA's apex with its CUDA extensions "
                f"({error}); build it from its source, or choose torch"
            ) from error
        self._parts = parts
        self._state = {
            name: {
                "step": torch.zeros((), device="cpu"),
                "exp_avg": torch.zeros_like(param.detach()),
                "exp_avg_sq": torch.zeros_like(param.detach()),
            }
            for name, param in self._named
        }
        for name, part in parts.items():
            moments = ("exp_avg", "exp_avg_sq")
            self._optimizer.state[part] = {
                key: local_part(self._state[name][key]) for key in moments
            }

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next updates."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def step(self, norm: Tensor) -> Tensor:
        """Update unless ``norm`` is not finite, drop the gradients; return 1.0 if skipped."""
        skipped = (~torch.isfinite(norm)).to(torch.float32)
        if not skipped.item():
            self._update()
        for _, param in self._named:
            param.grad = None
        return skipped

    def _update(self) -> None:
        for name, param in self._named:
            grad = param.grad
            self._parts[name].grad = None if grad is None else local_part(grad)
        # The counts a checkpoint brings are those of the parameters; apex has one per group.
        count = int(self._state[self._named[0][0]]["step"].item())
        for group in self._optimizer.param_groups:
            group["step"] = count
        self._optimizer.step()
        for state in self._state.values():
            state["step"].add_(1.0)
        self._optimizer.zero_grad()

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the live state by parameter name."""
        return {name: dict(state) for name, state in self._state.items()}

"""Muon for matrices and kernels, AdamW for norms and biases (Jordan et al. 2024).

Muon gives all directions of a matrix steps of one length, so that faint ones are not starved by
strong ones. A kernel of a convolution is taken as the matrix [outputs, everything else].
"""

import math

import torch
from torch import Tensor, nn

from hunyuan_train.models.lora import saved_parameters
from hunyuan_train.optim.clip import local_part
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.groups import build_optimizer, optimizer_tensors, step_if_finite
from hunyuan_train.optim.schedule import set_learning_rate
from hunyuan_train.parallel.whole import part_of_whole

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7
BUFFER = "momentum"
"""Name of the one state of a matrix, in checkpoints."""


class MuonAdamW:
    """Updates of plain or ``fully_shard`` parameters.

    The momentum is sharded like its weight. For an update the matrix is gathered, since its
    singular values are those of the whole, and every rank keeps its rows of the result.
    """

    def __init__(self, model: nn.Module, cfg: OptimizerConfig) -> None:
        """Build it over the trainable parameters of ``model``."""
        trainable = {n: p for n, p in saved_parameters(model).items() if p.requires_grad}
        self._cfg = cfg
        self._matrices = {name: p for name, p in trainable.items() if is_matrix(p)}
        self._momenta = {name: torch.zeros_like(p) for name, p in self._matrices.items()}
        self._rate = cfg.muon_lr
        self._others = None
        if len(self._matrices) < len(trainable):
            self._others = build_optimizer(model, cfg, wanted=lambda p: not is_matrix(p))

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of AdamW in the next update; that of Muon keeps its ratio to it."""
        self._rate = lr * self._cfg.muon_lr / self._cfg.lr
        if self._others is not None:
            set_learning_rate(self._others, lr)

    @torch.no_grad()
    def step(self, norm: Tensor) -> Tensor:
        """Update unless ``norm`` is not finite, drop the gradients; return 1.0 if skipped."""
        alive = torch.isfinite(norm).to(torch.float32)
        for name, param in self._matrices.items():
            if param.grad is not None:
                self._update(param, self._momenta[name], alive)
            param.grad = None
        if self._others is not None:
            step_if_finite(self._others, norm)
            self._others.zero_grad(set_to_none=True)
        return 1.0 - alive

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the live state by parameter name."""
        others = optimizer_tensors(self._others) if self._others is not None else {}
        return {name: {BUFFER: buffer} for name, buffer in self._momenta.items()} | others

    def _update(self, param: Tensor, buffer: Tensor, alive: Tensor) -> None:
        assert param.grad is not None
        decay, weight = self._cfg.muon_momentum, local_part(param.detach())
        alive = alive.to(weight.dtype)
        # A skipped update leaves the momentum alone, whatever is in the gradient.
        grad = (local_part(param.grad) * alive).nan_to_num(0.0, 0.0, 0.0)
        momentum = local_part(buffer)
        momentum.lerp_(grad, (1 - decay) * alive)
        step = part_of_whole(param, grad.lerp(momentum, decay), orthogonalized)
        rows, columns = param.shape[0], math.prod(param.shape[1:])
        rate = self._rate * max(1.0, rows / columns) ** 0.5 * alive
        weight.mul_(1 - self._rate * self._cfg.weight_decay * alive).sub_(step * rate)


def is_matrix(param: Tensor) -> bool:
    """Return whether it has columns: gains may have several dimensions, all of size 1 but one."""
    return param.ndim >= 2 and param.numel() > len(param)


def orthogonalized(step: Tensor) -> Tensor:
    """Return ``step`` with singular values near 1, by a quintic Newton-Schulz iteration.

    They end between about 0.7 and 1.2, which is what Muon asks for. In bfloat16 on a GPU.
    """
    matrix = step.reshape(len(step), -1)
    if matrix.device.type == "cuda":
        matrix = matrix.bfloat16()
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=_EPS)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(step.dtype).view(step.shape)

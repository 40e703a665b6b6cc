"""AdamW one parameter at a time, for weights in bfloat16, 8-bit moments and moments on the host.

Every piece of a parameter is brought to float32, updated by torch's fused kernel, and stored as it
was: weights rounded at random, moments as codes. So each choice works with every other, and what is
kept in float32 on the device gets the numbers of ``torch.optim.AdamW``.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from hunyuan_train.memory.config import MemoryConfig, Place, StateType
from hunyuan_train.memory.states import PIECE
from hunyuan_train.optim.clip import local_part
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.host_states import HostMemory, Visits
from hunyuan_train.optim.low_bit import Moment, moment_of
from hunyuan_train.optim.stochastic_rounding import RoundingKey, stochastic_round
from hunyuan_train.parallel.view import first_row


def needs_lean(memory: MemoryConfig) -> bool:
    """Return whether ``memory`` asks for what ``torch.optim.AdamW`` cannot do."""
    return memory.fused_backward or (
        (memory.weights.value, memory.optimizer_states, memory.optimizer_device)
        != ("float32", StateType.float32, Place.device)
    )


@dataclass(frozen=True, slots=True)
class _Kept:
    """One parameter of this rank."""

    weight: Tensor
    """Live local part."""
    first_row: int
    """Of the whole parameter that this part begins with."""
    decay: float
    step: Tensor
    """Updates done: a float32 scalar on the device."""
    moments: dict[str, Moment]
    stored: dict[str, dict[str, Tensor]]
    """What is kept of each moment, by suffix; DTensors where the parameter and they are alike."""
    in_place: bool
    """Whether moments are float32 on the device."""
    rounding: RoundingKey

    @property
    def row(self) -> int:
        """Values per row."""
        return self.weight[0].numel() if self.weight.shape[0] else 0

    def pieces(self) -> Iterator[slice]:
        """Yield the rows that are worked on together: all, where nothing is converted or copied."""
        rows, live = self.weight.shape[0], self.weight.dtype is torch.float32 and self.in_place
        each = rows if live else max(1, PIECE // max(1, self.row))
        yield from (slice(at, min(at + each, rows)) for at in range(0, rows, max(1, each)))


class LeanAdamW:
    """AdamW over named parameters, plain or DTensor; state exists from the start."""

    def __init__(
        self, params: Mapping[str, Tensor], cfg: OptimizerConfig, memory: MemoryConfig, seed: int
    ) -> None:
        """Allocate moments of zero.

        Args:
            params: Trainable parameters by name, all on one device.
            cfg: Hyperparameters; the rate is that of :meth:`set_learning_rate`.
            memory: What moments and weights are kept in.
            seed: Of the run, for rounding.

        Raises:
            ValueError: there is no parameter.
        """
        if not params:
            raise ValueError("the model has no trainable parameter to optimize")
        self._params = dict(params)
        self._cfg, self._memory, self._lr = cfg, memory, cfg.lr
        self._device = next(iter(params.values())).device
        on_host = memory.optimizer_device is Place.host
        self._visits = Visits(self._device) if on_host else None
        self._host = HostMemory(pinned=self._device.type == "cuda") if on_host else None
        self._kept = {name: self._keep(name, param, seed) for name, param in params.items()}

    def _keep(self, name: str, param: Tensor, seed: int) -> _Kept:
        weight = local_part(param.detach())
        assert weight.ndim
        assert weight.is_contiguous()
        assert weight.dtype in (torch.float32, torch.bfloat16)
        int8 = self._memory.optimizer_states is StateType.int8
        moments = {
            key: moment_of(weight.shape, int8=int8, signed=signed)
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
        }
        return _Kept(
            weight=weight,
            first_row=first_row(param),
            decay=self._cfg.weight_decay if param.ndim >= 2 else 0.0,
            step=torch.zeros((), device=self._device),
            moments=moments,
            stored={key: self._zeros(moment, param, weight) for key, moment in moments.items()},
            in_place=not int8 and self._host is None,
            rounding=RoundingKey(seed, name, self._device),
        )

    def _zeros(self, moment: Moment, param: Tensor, weight: Tensor) -> dict[str, Tensor]:
        found = {}
        for suffix, (shape, dtype) in moment.shapes(weight.shape).items():
            if self._host is not None:
                found[suffix] = self._host.zeros(shape, dtype)
            elif dtype is torch.float32 and shape == weight.shape:
                found[suffix] = torch.zeros_like(param.detach(), dtype=dtype)
            else:
                found[suffix] = torch.zeros(shape, dtype=dtype, device=self._device)
        return found

    def set_learning_rate(self, lr: float) -> None:
        """Set the rate of the next updates."""
        self._lr = lr

    def step(self, norm: Tensor) -> Tensor:
        """Update all that has a gradient unless ``norm`` is not finite, dropping each when used.

        Returns:
            1.0 if the update was skipped, else 0.0: a float32 scalar.
        """
        skipped = (~torch.isfinite(norm)).to(self._device, torch.float32)
        for name, param in self._params.items():
            if param.grad is not None:
                self.update(name, param.grad, skipped)
                param.grad = None
        return skipped

    @torch.no_grad()
    def update(self, name: str, grad: Tensor, skipped: Tensor) -> None:
        """Update one parameter, unless ``skipped`` is not 0: then nothing of it changes.

        Args:
            name: Of the parameter.
            grad: Plain or DTensor, float32 or narrower.
            skipped: float32 scalar on the device; there is no host sync.
        """
        kept, grad = self._kept[name], local_part(grad)
        kept.step.add_(1.0)
        draws = kept.rounding.at(kept.step) if kept.weight.dtype is torch.bfloat16 else None
        for rows in kept.pieces():
            weight, wide_grad = kept.weight[rows], grad[rows].contiguous().float()
            wide = weight if draws is None else weight.float()
            with self._here([local_part(t)[rows] for t in _flat(kept.stored)]) as parts:
                stored = _nested(kept.stored, parts)
                values = {key: moment.read(stored[key]) for key, moment in kept.moments.items()}
                self._kernel(kept, wide, wide_grad, values, skipped)
                for key, moment in kept.moments.items():
                    moment.write(stored[key], values[key], skipped)
            if draws is not None:
                # A skipped weight comes back to the bit: bfloat16 holds it exactly.
                start = (kept.first_row + rows.start) * kept.row
                weight.copy_(stochastic_round(wide, draws, start))
        kept.step.sub_(skipped)

    def _kernel(
        self, kept: _Kept, weight: Tensor, grad: Tensor, values: dict[str, Tensor], skipped: Tensor
    ) -> None:
        torch._fused_adamw_(
            [weight], [grad], [values["exp_avg"]], [values["exp_avg_sq"]], [], [kept.step],
            lr=self._lr, beta1=self._cfg.beta1, beta2=self._cfg.beta2,
            weight_decay=kept.decay, eps=self._cfg.eps,
            amsgrad=False, maximize=False, grad_scale=None, found_inf=skipped,
        )  # fmt: skip

    def _here(self, tensors: list[Tensor]) -> AbstractContextManager[list[Tensor]]:
        """Return ``tensors`` on the device for the length of a ``with`` block."""
        return nullcontext(tensors) if self._visits is None else self._visits.here(tensors)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the live state by parameter name; plain tensors are this rank's rows.

        Filling them restores it. Copies to the host are done when this returns.
        """
        if self._visits is not None:
            self._visits.settle()
        found = {}
        for name, kept in self._kept.items():
            found[name] = {"step": kept.step}
            for which, parts in kept.stored.items():
                found[name] |= {which + suffix: tensor for suffix, tensor in parts.items()}
        return found


def _flat(stored: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    return [tensor for parts in stored.values() for tensor in parts.values()]


def _nested(
    like: dict[str, dict[str, Tensor]], parts: list[Tensor]
) -> dict[str, dict[str, Tensor]]:
    remaining = iter(parts)
    return {key: {suffix: next(remaining) for suffix in inner} for key, inner in like.items()}

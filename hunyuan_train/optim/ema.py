"""Exponential moving average of the weights, kept in float32 and sharded like them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hunyuan_train.optim.clip import local_part
from hunyuan_train.optim.config import OptimizerConfig


class Ema:
    """Shadow weights ``s = d * s + (1 - d) * w``, one float32 tensor per trainable parameter.

    A DTensor parameter has a DTensor shadow with the same mesh and placements, so every rank stores
    its shard only. Build it after sharding and after the weights are initialised or loaded.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: OptimizerConfig,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start from the present weights of ``model``, or from ``weights``.

        Args:
            model: The model, whose trainable parameters are averaged by default.
            cfg: Decay and warm-up.
            weights: The live weights to average instead, by name, where another engine keeps them.
        """
        self._cfg = cfg
        self._model = model
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._params = dict(weights) if weights is not None else trainable
        self._shadow = {
            # copy=True: without it a float32 parameter would be its own average.
            n: p.detach().to(torch.float32, copy=True)
            for n, p in self._params.items()
        }
        self._swapped = False

    def decay(self, step: int) -> float:
        """Return the decay of update number ``step`` (0 is the first)."""
        if self._cfg.ema_warmup:
            return min(self._cfg.ema_decay, (1.0 + step) / (10.0 + step))
        return self._cfg.ema_decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the shadow towards the present weights; call it after optimizer update ``step``."""
        assert not self._swapped, "update() inside swap() would average the average"
        shadow = [local_part(s) for s in self._shadow.values()]
        weights = [local_part(p.detach()).float() for p in self._params.values()]
        torch._foreach_lerp_(shadow, weights, 1.0 - self.decay(step))  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def reset(self) -> None:
        """Set the shadow to the present weights, e.g. after another stage's weights were loaded."""
        assert not self._swapped
        for name, param in self._params.items():
            local_part(self._shadow[name]).copy_(local_part(param))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live float32 shadow tensors by parameter name."""
        assert not self._swapped, "state_dict() inside swap() would return the raw weights"
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state`` into the shadow.

        Raises:
            ValueError: The names or shapes differ from those of the model.
        """
        missing, unknown = self._shadow.keys() - state.keys(), state.keys() - self._shadow.keys()
        if missing or unknown:
            raise ValueError(
                "EMA state does not fit the model: "
                f"missing {sorted(missing)}, unknown {sorted(unknown)}"
            )
        for name, shadow in self._shadow.items():
            if shadow.shape != state[name].shape:
                raise ValueError(
                    f"EMA tensor {name} has shape {tuple(state[name].shape)}, "
                    f"the model needs {tuple(shadow.shape)}"
                )
            shadow.copy_(state[name])

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Put the averaged weights into the model for the body of a ``with`` block.

        Works in place, so sharded modules keep their storage. Float32 parameters are exchanged one
        by one; narrower ones need a copy of themselves meanwhile, because they cannot hold the
        float32 average.
        """
        assert not self._swapped, "swap() is not re-entrant"
        backup = self._exchange(None)
        self._swapped = True
        try:
            yield
        finally:
            self._exchange(backup)
            self._swapped = False

    @torch.no_grad()
    def _exchange(self, backup: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Exchange weights and shadow; ``backup`` holds the narrow weights to put back."""
        # fully_shard keeps the gathered weights of the root after a forward without a backward, and
        # the next forward would use them instead of the exchanged shards.
        for module in self._model.modules():
            if callable(reshard := getattr(module, "reshard", None)):
                reshard()
        narrow: dict[str, Tensor] = {}
        for name, param in self._params.items():
            weight, shadow = local_part(param.detach()), local_part(self._shadow[name])
            if weight.dtype != torch.float32:
                if backup is None:
                    narrow[name] = weight.clone()
                    weight.copy_(shadow)
                else:
                    weight.copy_(backup[name])
                continue
            kept = weight.clone()
            weight.copy_(shadow)
            shadow.copy_(kept)
        return narrow

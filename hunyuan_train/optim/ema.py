"""Exponential moving average of the weights, kept in float32 and sharded like them.

It lies beside the weights, or in pinned memory of the host, from where it visits the device piece
by piece (51 GB for 12.8e9 parameters, a second each way, both at once). Or there is none:
checkpoints then have no section "ema", and readers that ask for it get the weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hunyuan_train.memory.config import AveragePlace
from hunyuan_train.memory.states import PIECE
from hunyuan_train.optim.clip import local_part
from hunyuan_train.optim.config import OptimizerConfig
from hunyuan_train.optim.host_states import HostMemory, Visits


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
        place: AveragePlace = AveragePlace.device,
    ) -> None:
        """Start from the present weights of ``model``, or from ``weights``.

        Args:
            model: The model, whose trainable parameters are averaged by default.
            cfg: Decay and warm-up.
            weights: The live weights to average instead, by name, where another engine keeps them.
            place: Where it is kept, if at all.
        """
        self._cfg = cfg
        self._model = model
        trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._params = dict(weights) if weights is not None else trainable
        if place is AveragePlace.off:
            self._params = {}
        self._visits: Visits | None = None
        self._shadow = self._copies(on_host=place is AveragePlace.host)
        self._swapped = False

    def _copies(self, *, on_host: bool) -> dict[str, Tensor]:
        if not on_host or not self._params:
            # copy=True: without it a float32 parameter would be its own average.
            return {n: p.detach().to(torch.float32, copy=True) for n, p in self._params.items()}
        device = next(iter(self._params.values())).device
        self._visits = Visits(device)
        memory = HostMemory(pinned=device.type == "cuda")
        shadow = {}
        for name, param in self._params.items():
            local = local_part(param.detach())
            shadow[name] = memory.zeros(local.shape, torch.float32).copy_(local)
        return shadow

    def decay(self, step: int) -> float:
        """Return the decay of update number ``step`` (0 is the first)."""
        if self._cfg.ema_warmup:
            return min(self._cfg.ema_decay, (1.0 + step) / (10.0 + step))
        return self._cfg.ema_decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the shadow towards the present weights; call it after optimizer update ``step``."""
        assert not self._swapped, "update() inside swap() would average the average"
        share = 1.0 - self.decay(step)
        pairs = [
            (local_part(self._shadow[name]), local_part(param.detach()))
            for name, param in self._params.items()
        ]
        if self._visits is None and all(w.dtype is s.dtype for s, w in pairs):
            if pairs:
                shadow, weights = zip(*pairs, strict=True)
                torch._foreach_lerp_(shadow, weights, share)  # pyright: ignore[reportPrivateImportUsage]
            return
        for shadow, weight in pairs:
            pieces = zip(shadow.view(-1).split(PIECE), weight.view(-1).split(PIECE), strict=True)
            for average, present in pieces:
                if self._visits is None:
                    average.lerp_(present.float(), share)
                else:
                    with self._visits.here([average]) as (here,):
                        here.lerp_(present.float(), share)

    def lend(self) -> dict[str, Tensor] | None:
        """Return the live local parts by name, for an update that moves them itself.

        None where they are not all on the device of the weights.
        """
        assert not self._swapped, "an update inside swap() would average the average"
        if self._visits is not None or not self._params:
            return None
        return {name: local_part(shadow) for name, shadow in self._shadow.items()}

    @torch.no_grad()
    def reset(self) -> None:
        """Set the shadow to the present weights, e.g. after another stage's weights were loaded."""
        assert not self._swapped
        self._settle()
        for name, param in self._params.items():
            local_part(self._shadow[name]).copy_(local_part(param))

    def _settle(self) -> None:
        """Wait for copies to the host before it looks at them."""
        if self._visits is not None:
            self._visits.settle()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the live float32 shadow tensors by parameter name; none if it is off.

        On the host they are plain tensors of this rank's rows.
        """
        assert not self._swapped, "state_dict() inside swap() would return the raw weights"
        self._settle()
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy ``state``, tensors like those of :meth:`state_dict`, into the shadow.

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

        Without an average the weights stay.

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
        self._settle()
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

"""Refuses updates whose loss or gradient is not finite or whose loss jumps, and says what then.

Two halves, neither of which makes the host wait for the device:

- :meth:`Guard.screen` runs before the update, on the device: it turns the gradient norm into
  infinity where the loss is above a limit known since the update before, and an update with such a
  norm leaves the weights alone. So a refused update never becomes part of the state.
- :meth:`Guard.check` runs after it and judges the numbers of the update before, which have reached
  the host by then. Before a state is kept, :meth:`Guard.settle` judges the last update early.

All ranks must give the same bits: a loss and a norm reduced over *all* ranks. Then they also come
to the same verdict in the same step, without talking to each other.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.resilience.config import GuardAction, ResilienceConfig

_WINDOW = 50
_LEAST_HISTORY = 12
_LEAST_DEVIATION = 0.02
"""Of the log loss: with spike_factor 10, a rise of less than 22 % is never a spike."""
_LEAST_RISE = math.log(1.5)
"""Over what one in ten losses lately is above. Where losses have a long tail, the deviation of 50
of them is by chance small enough, once in ten thousand updates, to call the tail a spike."""

_NORMAL = 1.4826
"""Median absolute deviation to standard deviation, for a normal distribution."""

_NO_LIMIT = torch.finfo(torch.float32).max


class Outcome(StrEnum):
    """What the loop has to do."""

    ok = "ok"
    """Nothing."""
    skipped = "skipped"
    """Nothing but count: the update was left out."""
    rewind = "rewind"
    """Go back to the last good state and quarantine the samples."""
    stop = "stop"
    """End the run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """About one update."""

    outcome: Outcome
    step: int = 0
    samples: tuple[str, ...] = ()
    """Of this rank in that update."""
    loss: float | None = None
    norm: float | None = None
    """None where they are not finite."""
    reason: str = ""
    """Why it was refused, with the numbers compared, short."""
    sentence: str = ""
    """The same with step and samples."""


@dataclass(slots=True, kw_only=True)
class _Pending:
    """An update whose numbers may still be on their way to the host."""

    step: int
    kind: str
    samples: tuple[str, ...]
    limit: float
    host: Tensor
    arrived: "torch.cuda.Event | None" = None

    def read(self) -> tuple[float, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm = self.host.tolist()
        return loss, norm

    def accepted(self) -> bool:
        """Return whether the numbers are finite and the loss is no spike."""
        loss, norm = self.read()
        return math.isfinite(loss) and math.isfinite(norm) and loss <= self.limit


class Guard:
    """Follows the loss of a run.

    A loss is a spike when its logarithm is ``spike_factor`` robust deviations above the running
    median, taken over the last 50 accepted updates of the same kind. Losses of different buckets
    differ severalfold for good, so the kind should name the make-up of the update, like its
    costliest bucket; it must be the same on all ranks. The first 12 updates of a kind set its
    level and are only looked at for numbers that are not finite.
    """

    def __init__(self, cfg: ResilienceConfig) -> None:
        """Start without history."""
        self._action, self._factor = cfg.guard, cfg.spike_factor
        self._patience = max(cfg.max_skipped, 1)
        self._recent: dict[str, deque[float]] = {}
        self._refused = 0
        self._furthest = 0
        self._pending: _Pending | None = None

    def limit(self, kind: str = "") -> float:
        """Return the loss above which an update of this kind is a spike."""
        recent = self._recent.get(kind, ())
        if len(recent) < _LEAST_HISTORY:
            return _NO_LIMIT
        middle = statistics.median(recent)
        spread = _NORMAL * statistics.median(abs(value - middle) for value in recent)
        high = sorted(recent)[-1 - len(recent) // 10]
        exponent = max(middle + self._factor * max(spread, _LEAST_DEVIATION), high + _LEAST_RISE)
        # Rounded as the device rounds it, so that both sides of this module agree to the last bit.
        return torch.tensor(math.exp(min(exponent, 80.0)), dtype=torch.float32).item()

    def screen(self, loss: Tensor, norm: Tensor, kind: str = "") -> Tensor:
        """Return the norm to update with: infinite where the update is to be left out.

        Args:
            loss: Of this update over all ranks, a scalar on the device.
            norm: Of its gradients, likewise.
            kind: What sort of update it is.
        """
        if self._action is GuardAction.off:
            return norm
        return torch.where(loss <= self.limit(kind), norm, torch.inf)

    def check(
        self, step: int, loss: Tensor, norm: Tensor, samples: Sequence[str] = (), kind: str = ""
    ) -> Judgement:
        """Take the numbers of update ``step`` and judge the one before.

        Args:
            step: Updates done, this one included.
            loss: As given to :meth:`screen`.
            norm: Norm of the gradients before :meth:`screen`.
            samples: Identities of this rank's samples in it.
            kind: As given to :meth:`screen`.

        Returns:
            What to do, about update ``step - 1``; ``ok`` where there is none.
        """
        if self._action is GuardAction.off:
            return Judgement(outcome=Outcome.ok)
        limit = self.limit(kind)
        before, self._pending = self._pending, None
        judged = self._judge(before) if before is not None else Judgement(outcome=Outcome.ok)
        values = torch.stack([loss.detach().float(), norm.detach().float()])
        arrived = None
        if values.is_cuda:
            host = torch.empty(2, pin_memory=True)
            host.copy_(values, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            host = values
        self._pending = _Pending(
            step=step, kind=kind, samples=tuple(samples), limit=limit, host=host, arrived=arrived
        )
        return judged

    def settle(self) -> Judgement:
        """Judge the last update now if the run has to go back because of it.

        Called before the state is kept somewhere, it waits for that update's numbers; no state that
        is kept then has a refused update as its last. An accepted one is judged in its turn:
        otherwise limits would depend on when states are kept.

        Returns:
            What :meth:`check` would about it; ``ok`` if it is accepted or the action is another.
        """
        update = self._pending
        if self._action is not GuardAction.rewind or update is None or update.accepted():
            return Judgement(outcome=Outcome.ok)
        self._pending = None
        return self._judge(update)

    def _judge(self, update: _Pending) -> Judgement:
        loss, norm = update.read()
        if update.accepted():
            recent = self._recent.setdefault(update.kind, deque(maxlen=_WINDOW))
            recent.append(math.log(max(loss, 1e-12)))
            if update.step > self._furthest:
                self._refused = 0
            return Judgement(outcome=Outcome.ok, step=update.step)
        # Steps passed again after a rewind do not count as progress.
        self._refused, self._furthest = self._refused + 1, max(self._furthest, update.step)
        outcome = {
            GuardAction.skip: Outcome.skipped,
            GuardAction.rewind: Outcome.rewind,
            GuardAction.stop: Outcome.stop,
        }[self._action]
        finite = math.isfinite(loss) and math.isfinite(norm)
        verdict = f"is above the limit of {update.limit:.4g}" if finite else "is not finite"
        what = f"loss {loss:.4g}" if finite or not math.isfinite(loss) else f"gradient norm {norm}"
        reason = f"{what} {verdict}"
        numbers = f"(loss {loss:.4g}, gradient norm {norm:.4g}, {_some(update.samples)})"
        sentence = f"step {update.step}: {reason} {numbers}"
        if self._refused >= self._patience and outcome is not Outcome.stop:
            outcome = Outcome.stop
            sentence += f"; {self._refused} updates were refused in a row"
        return Judgement(
            outcome=outcome, step=update.step, samples=update.samples, reason=reason,
            sentence=sentence, loss=loss if math.isfinite(loss) else None,
            norm=norm if math.isfinite(norm) else None,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, ready for JSON; it waits for the last update's numbers.

        Those are kept as they are, to be judged in the next step as they would have been.
        """
        pending = self._pending
        kept = None
        if pending is not None:
            kept = [pending.step, pending.kind, list(pending.samples), pending.limit]
            kept += [repr(value) for value in pending.read()]  # JSON has no infinity
        return {
            "recent": {kind: list(values) for kind, values in self._recent.items()},
            "refused": self._refused,
            "furthest": self._furthest,
            "pending": kept,
        }

    def forget(self) -> None:
        """Start without history, but for the refusals counted."""
        self._recent, self._pending = {}, None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned.

        Refusals that this process has counted since then stay counted, or a run that rewinds to the
        same spike again and again would never stop.
        """
        self._recent = {kind: deque(v, maxlen=_WINDOW) for kind, v in state["recent"].items()}
        self._refused = max(self._refused, state["refused"])
        self._furthest = max(self._furthest, state["furthest"])
        self._pending = None
        if state["pending"] is not None:
            step, kind, samples, limit, *numbers = state["pending"]
            self._pending = _Pending(
                step=step, kind=kind, samples=tuple(samples), limit=limit,
                host=torch.tensor([float(number) for number in numbers]),
            )  # fmt: skip


def _some(samples: Sequence[str]) -> str:
    shown = " ".join(samples[:8])
    more = f" and {len(samples) - 8} more" if len(samples) > 8 else ""
    return f"samples {shown}{more}" if samples else "no samples here"

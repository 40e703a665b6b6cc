"""Which parameters an update trains: some never, some from a certain update on.

Nothing of this is state: what is frozen follows from the config and the number of the update, so a
restart in the middle goes on exactly.
"""

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from hunyuan_train.optim.config import OptimizerConfig


class Unfreezing:
    """The first update of every parameter."""

    def __init__(self, names: Iterable[str], cfg: OptimizerConfig) -> None:
        """Look the patterns up.

        Args:
            names: Of all parameters of the model.
            cfg: With ``trainable`` and ``unfreeze``.

        Raises:
            ValueError: a pattern matches nothing, or nothing is trained at first.
        """
        names = list(names)
        for field, patterns in (("trainable", cfg.trainable), ("unfreeze", cfg.unfreeze)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ValueError(
                        f"optimizer.{field} has the pattern {pattern!r}, which is no parameter of "
                        f"the model; names are like {names[0]} and {names[-1]}"
                    )
        self._first = {
            name: max((n for p, n in cfg.unfreeze.items() if fnmatchcase(name, p)), default=1)
            for name in names
            if not cfg.trainable or any(fnmatchcase(name, p) for p in cfg.trainable)
        }
        self.never = frozenset(names) - self._first.keys()
        """Parameters that are not trained at all."""
        if min(self._first.values()) > 1:
            raise ValueError(
                f"optimizer.unfreeze={cfg.unfreeze} leaves nothing to train in the first update; "
                "leave out the parameters to begin with"
            )

    def frozen(self, done: int) -> frozenset[str]:
        """Return the parameters that are left alone after ``done`` updates, but not for ever."""
        return frozenset(name for name, first in self._first.items() if done + 1 < first)

    def apply(self, params: Mapping[str, nn.Parameter]) -> None:
        """Spare those that are never trained their gradients."""
        for name in self.never:
            params[name].requires_grad_(False)

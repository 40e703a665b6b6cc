"""Options of checkpoints."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When checkpoints are written, how many are kept and how they are checked."""

    every_steps: int = 500
    """Updates between two checkpoints; 0 saves only at the end and on preemption."""
    keep_last: int = 3
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Steps whose multiples are kept for good; 0 keeps none beyond keep_last."""
    verify_hashes: bool = True
    """Compare the content of every file with its hash on restore, not only its size."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a negative count."""
        for name in ("every_steps", "keep_last", "keep_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must not be negative")

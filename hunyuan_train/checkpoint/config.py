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
    every_s: float = 0
    """Seconds between two checkpoints, besides every_steps; 0 goes by steps alone."""
    keep_best: int = 0
    """Checkpoints with the lowest held-out loss kept besides the newest; 0 keeps none."""
    asynchronous: bool = True
    """Write in a separate process while training goes on; off waits for the disk."""
    verify_hashes: bool = True
    """Compare the content of every file with its hash on restore, not only its size."""
    digests: bool = True
    """Store a digest per tensor that does not depend on the layout, and compare it on restore."""
    replay: bool = True
    """Store loss, gradient norm and samples of the step after, and compare them after restore."""
    replay_tolerance: float = 1e-5
    """Largest relative difference of the replayed step under another layout; 0 under the same."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a negative count."""
        for name in ("every_steps", "keep_last", "keep_every", "every_s", "keep_best"):
            if getattr(self, name) < 0:
                raise ValueError(f"checkpoint.{name}={getattr(self, name)} must not be negative")
        if self.replay_tolerance < 0:
            raise ValueError(
                f"checkpoint.replay_tolerance={self.replay_tolerance} must not be negative"
            )

"""Options of preemption handling."""

import signal
from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class ResilienceConfig:
    """How a run reacts when the scheduler wants its machine back."""

    preemption_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1"])
    """Signals that ask for a checkpoint and an early end; an empty list leaves all signals
    alone."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a signal this system does not have or cannot catch."""
        for name in self.preemption_signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(
                    f"resilience.preemption_signals has {name!r}, no signal that can be caught; "
                    "use names such as SIGTERM or SIGUSR1"
                )

"""Options of preemption handling."""

import signal
from dataclasses import dataclass, field
from enum import StrEnum

from hunyuan_train.resilience.faults import parse_faults


class GuardAction(StrEnum):
    """What to do about a loss or gradient that is not finite, or a loss that jumps."""

    off = "off"
    skip = "skip"
    rewind = "rewind"
    stop = "stop"


@dataclass(kw_only=True, slots=True)
class ResilienceConfig:
    """How a run reacts when the scheduler wants its machine back."""

    preemption_signals: list[str] = field(default_factory=lambda: ["SIGTERM", "SIGUSR1"])
    """Signals that ask for a checkpoint and an early end; an empty list leaves all signals
    alone."""

    snapshot_every: int = 0
    """Updates between two copies of the state into host memory, here and on a peer; 0 makes
    none."""

    snapshot_dir: str = ""
    """Memory file system for the copies; empty is a folder of the run in /dev/shm."""

    watchdog_s: float = 0
    """Seconds without progress after which a rank counts as hung; 0 watches nothing."""

    stall_factor: float = 10
    """A step that takes this many times the median counts as hung too, from watchdog_min_s on."""

    watchdog_min_s: float = 5
    """Least seconds of a step before stall_factor counts."""

    straggler_factor: float = 1.5
    """A rank this many times slower than the median rank is called a straggler."""

    straggler_steps: int = 20
    """Steps a rank has to stay slow before it is called a straggler."""

    guard: GuardAction = GuardAction.skip
    """skip leaves such an update out, rewind goes back to the last good state and quarantines the
    samples, stop ends the run, off does nothing."""

    spike_factor: float = 10
    """A loss this many robust deviations above its running median, and half above the highest tenth
    of the last ones, is a spike."""

    max_skipped: int = 20
    """Updates left out in a row before the run stops."""

    replica_every: int = 0
    """Updates between two comparisons of what several ranks hold alike; 0 compares nothing."""

    faults: list[str] = field(default_factory=list)
    """Faults to inject in a drill, as kind@rank:step[:key=value]; see ``resilience.faults``."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a signal this system does not have or cannot catch."""
        for name in self.preemption_signals:
            if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP"):
                raise ValueError(
                    f"resilience.preemption_signals has {name!r}, no signal that can be caught; "
                    "use names such as SIGTERM or SIGUSR1"
                )
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(
                    f"resilience.{name}={getattr(self, name)} must be at least {least}"
                )
        parse_faults(self.faults)


_LEAST = {
    "snapshot_every": 0,
    "watchdog_s": 0,
    "stall_factor": 1,
    "watchdog_min_s": 0,
    "straggler_factor": 1,
    "straggler_steps": 1,
    "spike_factor": 1,
    "max_skipped": 0,
    "replica_every": 0,
}


@dataclass(kw_only=True, slots=True)
class LaunchConfig:
    """How many processes ``hunyuan-train launch`` starts where, and what it does when some fail."""

    nodes: int = 1
    """Machines that train."""

    ranks_per_node: int = 1
    """Processes on each, one per GPU."""

    spares: int = 0
    """Further machines that wait to take the place of a failed one."""

    min_nodes: int = 0
    """Machines to go on with when no spare is left; 0 waits instead of shrinking."""

    rendezvous: str = ""
    """HOST on the network over which the ranks talk, such as the first machine; a port after it is
    ignored. Empty takes the network of the default route."""

    node_rank: int = -1
    """Number of this machine; -1 lets the rendezvous choose."""

    max_restarts: int = 100
    """Attempts after the first."""

    backoff_s: float = 1
    """Wait before a restart, doubled after each failure without progress."""

    max_backoff_s: float = 60
    """Longest wait before a restart."""

    same_failure_limit: int = 2
    """Times the same exception may end the same step before it counts as an error of the code."""

    layouts: list[str] = field(default_factory=list)
    """Layouts allowed when machines are missing, like "tp=2,cp_ring=2", best first."""

    preflight: bool = True
    """Check devices, memory, disk, versions and bandwidth before the first attempt."""

    grace_s: float = 30
    """Seconds a process gets to save and end after SIGTERM."""

    lease_s: float = 10
    """Seconds of silence after which a machine counts as lost."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a count that cannot work."""
        for name in ("nodes", "ranks_per_node", "same_failure_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"launch.{name}={getattr(self, name)} must be at least 1")
        for name in ("spares", "min_nodes", "max_restarts", "backoff_s", "grace_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"launch.{name}={getattr(self, name)} must not be negative")
        if not self.lease_s > 0:
            raise ValueError(f"launch.lease_s={self.lease_s} must be above 0; 10 is the default")
        if self.min_nodes > self.nodes:
            raise ValueError(
                f"launch.min_nodes={self.min_nodes} is above launch.nodes={self.nodes}; lower it"
            )

"""Why an attempt ended: what a rank says before it dies, and what its end means.

Free of torch: the processes above the ranks import it.
"""

import json
import os
import re
import signal
import traceback
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

from hunyuan_train.resilience.heartbeat import health_folder
from hunyuan_train.runtime.env import child_environment

CRASH_FILE = "HUNYUAN_CRASH_FILE"
"""Variable in which the launcher tells a rank where to write its last exception."""

EXIT_PREEMPTED = 75
"""Exit code of a run that saved a checkpoint and ended on request: EX_TEMPFAIL of sysexits.h, "try
again later". A scheduler script restarts the same command on this code and on no other."""

EXIT_BAD_INPUT = 2
"""Exit code with which a verb says that its input cannot work."""

_TRACEBACK_LINES = 12
_PEER_LOST = re.compile(
    r"connection (closed|reset|refused|was likely closed)|broken pipe|connectFullMesh|"
    r"nccl|socket (timeout|closed)|recvValue failed|timed out (after|waiting)|wait timeout|"
    r"failed to (recv|send|connect)|heartbeat monitor|store.*(timeout|lost)",
    re.IGNORECASE,
)
_PEER_LOST_TYPES = ("DistNetworkError", "DistBackendError", "DistStoreError", "ConnectionError")
_VARYING = re.compile(r"0x[0-9a-f]+|\[[0-9a-f.:]+\]:\d+|\b\d+\.\d+\.\d+\.\d+(:\d+)?")


class Kind(StrEnum):
    """What a failed rank died of."""

    exception = "exception"
    """A Python exception of its own."""
    peer = "peer"
    """An exception because another rank had gone: says nothing about this rank."""
    signal = "signal"
    """A signal: a crash in native code, the kernel short of memory, somebody's kill."""
    exit = "exit"
    """An exit code without an exception."""
    refused = "refused"
    """Exit code 2: its verb said in a sentence that the input cannot work."""
    hang = "hang"
    """No progress: the watchdog ended it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """One rank's end that was not asked for."""

    rank: int
    node: int
    code: int
    """Exit code; minus the signal's number for a signal."""
    step: int = -1
    """Last step the rank was seen at; -1 is unknown."""
    type: str = ""
    """Class of its last exception, empty without one."""
    message: str = ""
    """Text of the exception, or the watchdog's sentence."""
    trace: str = ""
    """Last lines of the traceback."""
    hung: bool = False
    since: float = 0.0
    """System time of its end, or of its last sign of life if it hung; 0 is unknown."""

    @property
    def kind(self) -> Kind:
        """What the rank died of."""
        if self.hung:
            return Kind.hang
        if self.code == EXIT_BAD_INPUT:
            return Kind.refused
        if not self.type:
            return Kind.signal if self.code < 0 else Kind.exit
        if self.type in _PEER_LOST_TYPES or _PEER_LOST.search(self.message):
            return Kind.peer
        return Kind.exception

    @property
    def key(self) -> tuple[int, int, str, str] | None:
        """What two attempts have in common when the code or the data is at fault, else None."""
        if self.kind is Kind.exception:
            return self.rank, self.step, self.type, _VARYING.sub("#", self.message)
        return None

    def sentence(self) -> str:
        """Say what happened to which rank, at which step."""
        where = f"rank {self.rank} on node {self.node}"
        when = f" at step {self.step}" if self.step >= 0 else ""
        if self.hung:
            return f"{where} hung{when}: {self.message}"
        if self.type:
            first = self.message.strip().splitlines()[:1] or [""]
            return f"{where} raised {self.type}{when}: {first[0]}"
        if self.code < 0:
            return f"{where} was ended by {signal_name(-self.code)}{when}"
        return f"{where} ended with exit code {self.code}{when}"

    def to_dict(self) -> dict[str, object]:
        """Return the fields, fit for JSON."""
        return asdict(self)


def signal_name(number: int) -> str:
    """Return the name of a signal, such as ``SIGKILL``."""
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"


def crash_path(run_dir: Path, attempt: int, rank: int) -> Path:
    """Return the file in which a rank leaves its last exception."""
    return health_folder(run_dir, attempt) / f"rank-{rank}.error"


def record_crash(error: BaseException) -> bool:
    """Leave ``error`` where the launcher asked for it; without a launcher do nothing.

    A verb's top level calls it for the exception that ends the process. It never raises: the
    original error must stay the one that is seen. The first record stays.

    Returns:
        Whether there is a record, which the launcher reads.
    """
    target = child_environment().get(CRASH_FILE)
    if not target or isinstance(error, SystemExit | KeyboardInterrupt):
        return False
    if not Path(target).exists():
        _write_crash(error, Path(target))
    return Path(target).exists()


def _write_crash(error: BaseException, path: Path) -> None:
    lines = "".join(traceback.format_exception(error)).splitlines()
    crash = {
        "type": type(error).__name__,
        "message": str(error)[:2000],
        "step": getattr(error, "step", -1),
        "trace": "\n".join(lines[-_TRACEBACK_LINES:]),
    }
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(crash))
        temporary.replace(path)


def read_failure(
    run_dir: Path, attempt: int, rank: int, node: int, code: int, step: int = -1
) -> Failure:
    """Put together what is known about a rank that ended with ``code``."""
    crash: dict[str, object] = {}
    with suppress(OSError, ValueError):
        crash = json.loads(crash_path(run_dir, attempt, rank).read_text())
    told = crash.get("step", -1)
    return Failure(
        rank=rank,
        node=node,
        code=code,
        step=told if isinstance(told, int) and told >= 0 else step,
        type=str(crash.get("type", "")),
        message=str(crash.get("message", "")),
        trace=str(crash.get("trace", "")),
    )


def culprits(failures: Sequence[Failure]) -> list[Failure]:
    """Return the failures that explain the others: ranks that only lost a peer come last."""
    causes = [failure for failure in failures if failure.kind is not Kind.peer]
    return causes or list(failures)


def repeated(history: Sequence[Sequence[Failure]], limit: int) -> Failure | None:
    """Return the last attempt's failure that ended ``limit`` attempts in the same way.

    The same exception of the same rank at the same step, again: hardware does not fail like that,
    code and data do. A signal or a lost peer never counts.

    Args:
        history: The failures of each attempt, the last attempt last.
        limit: Number of attempts that makes a repetition.
    """
    counts = Counter(key for failed in history for key in {f.key for f in failed} if key)
    for failure in history[-1] if history else ():
        if failure.key is not None and counts[failure.key] >= limit:
            return failure
    return None

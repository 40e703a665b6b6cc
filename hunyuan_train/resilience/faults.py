"""Which fault strikes where in a drill: the entries of ``resilience.faults``. Free of torch.

An entry is ``kind@rank:step`` with optional ``:key=value`` pairs, like ``sigkill@2:40`` or
``slow@1:10:factor=3``. The step is that of the update under way, so ``40`` strikes while 39 updates
are done; the rank may be ``*``. An entry strikes once per process, and only in its attempt.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """What a drill can do to a rank."""

    sigkill = "sigkill"
    sigsegv = "sigsegv"
    """It reads address 0."""
    abort = "abort"
    exception = "exception"
    sigstop = "sigstop"
    gil = "gil"
    """Native code that sleeps and keeps Python's lock, so that no thread of the process runs."""
    loop = "loop"
    """Python code that never ends, so that the rank never comes to its next collective."""
    slow = "slow"
    """From this step on, each forward takes ``factor`` times what it took, or ``seconds`` more."""
    flip_parameter = "flip_parameter"
    """One bit of one weight that this rank holds, between two updates."""
    flip_moment = "flip_moment"
    """The same in the optimizer's state."""
    flip_gradient = "flip_gradient"
    """The same in what backward left, before the sum over ranks if the weights are not sharded."""
    flip_wire = "flip_wire"
    """The same in what the sum over ranks delivered here."""
    nan = "nan"
    """One element of the gradient that backward left."""
    enospc = "enospc"
    """The writer process may not write the next checkpoint: the kernel refuses, as a full disk."""
    torn = "torn"
    """The newest checkpoint's file of this rank loses its second half."""
    corrupt = "corrupt"
    """One bit of that file."""
    missing = "missing"
    """That file is deleted."""
    stale_pointer = "stale_pointer"
    """The oldest checkpoint appears once more under a name that says it is the newest."""
    writer_death = "writer_death"
    """The process that writes this rank's checkpoints is killed."""
    loader_death = "loader_death"
    """A decoding process is killed; where threads read, one of them ends."""


PHASES = ("data", "forward", "backward", "update", "evaluate", "save")
"""When in an update a fault can strike; ``evaluate`` and ``save`` are the evaluation and the
checkpoint after it, where one is due."""

_ANYWHERE = {
    *(FaultKind.sigkill, FaultKind.sigsegv, FaultKind.abort, FaultKind.exception),
    *(FaultKind.sigstop, FaultKind.gil, FaultKind.loop),
}
_PHASE_OF = {
    FaultKind.slow: "forward",
    FaultKind.flip_gradient: "update",
    FaultKind.flip_wire: "update",
    FaultKind.nan: "update",
    FaultKind.enospc: "save",
}
_ENTRY = re.compile(r"(?P<kind>[^@:]+)@(?P<rank>[^@:]+):(?P<step>[^@:]+)(?P<rest>(?::[^@:]+)*)")
_KEYS = ("attempt", "phase", "seconds", "factor")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """One entry."""

    kind: FaultKind
    rank: int | None
    """None is every rank."""
    step: int
    """The update under way, from 1."""
    attempt: int | None = 0
    """None is every attempt."""
    phase: str
    seconds: float = 0.0
    factor: float = 2.0

    def concerns(self, rank: int, attempt: int) -> bool:
        """Return whether it is meant for this rank in this attempt."""
        return self.rank in (None, rank) and self.attempt in (None, attempt)


def parse_faults(entries: Sequence[str]) -> list[Fault]:
    """Return the faults of ``resilience.faults``.

    Raises:
        ValueError: naming the entry, what is wrong with it and what can be chosen.
    """
    return [_parse(entry) for entry in entries]


def _parse(entry: str) -> Fault:
    where = f"resilience.faults has {entry!r}"
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise ValueError(f"{where}: write kind@rank:step[:key=value], such as sigkill@1:20")
    if match["kind"] not in FaultKind.__members__:
        raise ValueError(f"{where}: choose as kind one of {' '.join(FaultKind)}")
    kind = FaultKind(match["kind"])
    given = {}
    for pair in filter(None, match["rest"].split(":")):
        key, sign, value = pair.partition("=")
        if key not in _KEYS or not sign or key in given:
            raise ValueError(f"{where}: {pair!r} is not one of {'= '.join(_KEYS)}=, each once")
        given[key] = value
    return Fault(
        kind=kind,
        rank=_whole(where, "rank", match["rank"], least=0, any_=True),
        step=_whole(where, "step", match["step"], least=1) or 0,
        attempt=_whole(where, "attempt", given.get("attempt", "0"), least=0, any_=True),
        phase=_phase(where, kind, given.get("phase")),
        seconds=_number(where, "seconds", given.get("seconds", "0"), least=0),
        factor=_number(where, "factor", given.get("factor", "2"), least=1),
    )


def _whole(where: str, name: str, text: str, *, least: int, any_: bool = False) -> int | None:
    if any_ and text == "*":
        return None
    if not text.isascii() or not text.isdigit() or int(text) < least:
        star = " or *" if any_ else ""
        raise ValueError(f"{where}: {name} {text} must be a whole number from {least} on{star}")
    return int(text)


def _number(where: str, name: str, text: str, *, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value < float("inf"):
        raise ValueError(f"{where}: {name}={text} must be a number from {least:g} on")
    return value


def _phase(where: str, kind: FaultKind, given: str | None) -> str:
    if kind not in _ANYWHERE:
        if given is not None:
            raise ValueError(f"{where}: {kind} has its own moment; remove phase={given}")
        return _PHASE_OF.get(kind, "data")
    if given is not None and given not in PHASES:
        raise ValueError(f"{where}: phase={given} must be one of {' '.join(PHASES)}")
    return given or "forward"

"""Where the machines of a job meet: small files in ``run_dir/launch``, no host to be lost.

Free of torch. Three rules make it safe without locks or a common clock:

- A file other than a member's own record is written once, under a name that only one writer can
  take (a hard link, which exists whole or not at all). Whoever writes the plan of attempt n first
  has decided it, even if two machines believe they lead.
- Every agent writes a new number into its record now and then. Who does not see the number change
  for ``lease_s`` of its *own* monotonic clock takes that agent for lost; times of different
  machines are never compared.
- Attempts and members are numbered upwards for ever, so nothing of an old attempt can be taken for
  part of a new one.
"""

import fcntl
import json
import os
import re
import socket
import struct
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hunyuan_train.resilience.crashes import Failure
from hunyuan_train.resilience.heartbeat import process_start

LOOPBACK = "127.0.0.1"
_ANYWHERE = "8.8.8.8"
"""Any address beyond the default route; nothing is sent there."""
_SIOCGIFADDR = 0x8915
_NAME = re.compile(r"(plan|meet|alarm|report|resize|stop)-(\d+)(?:-(\d+))?\.json")


@dataclass(kw_only=True, slots=True)
class Member:
    """One agent's record about itself; only that agent writes it."""

    ticket: int
    """Order of arrival; the lowest living one leads."""
    host: str = ""
    machine: str = ""
    """Boot and process namespace: where ``pid`` means something."""
    pid: int = 0
    started: int = 0
    address: str = ""
    network: str = ""
    """Boot and network namespace: where an address of the loopback interface means it."""
    node_rank: int = -1
    """The node number it asks for, -1 for any."""
    beat: int = 0
    """Changes with every write."""
    wall: float = 0.0
    """Its clock at that time, for the check of clock skew only."""
    left: bool = False
    """Whether it has ended as it should."""
    healthy: bool = True
    why: str = ""
    """What the pre-flight check complains about."""
    health: dict[str, Any] = field(default_factory=dict)
    states: list[dict[str, Any]] = field(default_factory=list)
    """What the watchdog sees of its ranks, where several machines take part."""
    attempt: int = -1
    """Attempt that ``states`` belong to."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Who runs an attempt and how."""

    attempt: int
    tickets: list[int]
    """The members, by node number."""
    hosts: list[str]
    overrides: list[str] = field(default_factory=list)
    """Changes of the layout, when machines are missing."""
    excluded: dict[str, str] = field(default_factory=dict)
    """Tickets that are not used again, and why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """How an attempt ended on one node."""

    attempt: int
    node: int
    codes: dict[str, int]
    """Exit codes by rank."""
    failures: list[Failure]
    seconds: float
    """How long the attempt ran here."""
    progress: list[Any]
    """How far the run was: stage folder and step of its newest checkpoint, last step here. Lists
    compare like progress."""


@dataclass(kw_only=True, slots=True)
class Attempt:
    """All that is known about one attempt."""

    plan: Plan
    meet: dict[str, Any] | None = None
    """Address and port of rank 0."""
    alarm: dict[str, Any] | None = None
    """Set when the attempt cannot go on: everyone stops."""
    resize: bool = False
    """Whether the ranks were asked to save and end for a larger world."""
    reports: dict[int, Report] = field(default_factory=dict)


class Board:
    """The folder ``run_dir/launch`` as one agent sees it."""

    def __init__(self, run_dir: Path, *, lease_s: float, address: str, node_rank: int = -1) -> None:
        """Join: take the next ticket."""
        self.folder = run_dir / "launch"
        (self.folder / "members").mkdir(parents=True, exist_ok=True)
        self._lease_s = lease_s
        self._read: dict[str, dict[str, Any]] = {}  # written once, read once
        self._seen: dict[int, tuple[int, float]] = {}  # ticket -> beat, when it changed
        self._gone: set[int] = set()
        self._scanned_at = time.monotonic()
        self.stops: dict[int, dict[str, Any]] = {}
        self.attempts: dict[int, Attempt] = {}
        """Of this job: those after the last stop."""
        self.members: dict[int, Member] = {}
        """The living ones, this one included."""
        self.skew_s: dict[int, float] = {}
        """By how much this clock was ahead of each member's, at least: the delay is in it, too."""
        self.me = Member(
            ticket=0,
            host=socket.gethostname(),
            machine=_machine("pid"),
            network=_machine("net"),
            pid=os.getpid(),
            started=process_start(os.getpid())[1],
            address=address,
            node_rank=node_rank,
        )
        self.scan()
        self.joined = max(self.stops, default=-1)
        """The last stop before this agent came: earlier ones are other jobs."""
        self._take_ticket()
        self.scan()

    @property
    def leads(self) -> bool:
        """Whether this agent decides at the moment."""
        return self.me.ticket == min(self.members, default=self.me.ticket)

    @property
    def next_attempt(self) -> int:
        """The number of the next attempt."""
        numbers = [int(m[2]) for name in self._read if (m := _NAME.fullmatch(name))]
        return max([*numbers, self.joined], default=-1) + 1

    def beat(self, *, left: bool = False) -> None:
        """Renew this agent's record."""
        self.me.beat += 1
        self.me.wall = time.time()
        self.me.left = left
        path = self._member_path(self.me.ticket)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(self.me)))
        temporary.replace(path)

    def put(self, name: str, content: dict[str, Any]) -> bool:
        """Write ``name.json`` if nobody has; return whether this agent was the first."""
        target = self.folder / f"{name}.json"
        temporary = self.folder / f".{name}.{self.me.ticket}.tmp"
        temporary.write_text(json.dumps(content))
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        self._take(target.name, content)
        return True

    def scan(self) -> None:
        """Read what is new."""
        for name in sorted(os.listdir(self.folder)):
            if name not in self._read and _NAME.fullmatch(name):
                self._take(name, json.loads((self.folder / name).read_text()))
        now = time.monotonic()
        if now - self._scanned_at > self._lease_s / 2:
            # This process or the file system stood still: nobody is to blame for that while.
            self._seen = {ticket: (beat, now) for ticket, (beat, _) in self._seen.items()}
        self._scanned_at = now
        before, self.members = self.members, {}
        names = set(os.listdir(self.folder / "members"))
        for name in sorted(names):
            stem, _, suffix = name.partition(".")
            if suffix == "gone":
                self._gone.add(int(stem))
            elif suffix == "json" and stem.isdigit() and int(stem) not in self._gone:
                member = self._look(int(stem), before, now)
                if member is not None and f"{stem}.gone" not in names:
                    self.members[int(stem)] = member

    def _take(self, name: str, content: dict[str, Any]) -> None:
        self._read[name] = content
        match = _NAME.fullmatch(name)
        assert match is not None
        kind, number = match[1], int(match[2])
        if kind == "stop":
            self.stops[number] = content
            self.attempts = {n: a for n, a in self.attempts.items() if n > number}
        elif kind == "plan" and number > max(self.stops, default=-1):
            attempt = Attempt(plan=Plan(**content))
            self.attempts[number] = attempt
            for other, told in self._read.items():  # what was read before the plan
                if other != name and (m := _NAME.fullmatch(other)) and int(m[2]) == number:
                    _add(attempt, m[1], told)
        elif number in self.attempts:
            _add(self.attempts[number], kind, content)

    def give_up(self, ticket: int) -> None:
        """Tell everyone that a member is lost; if it lives after all it has to join anew."""
        self._gone.add(ticket)
        self.members.pop(ticket, None)
        self._member_path(ticket).with_suffix(".gone").touch()

    def rejoin(self) -> None:
        """Take a new ticket if this agent was given up, for it stood still or saw no files."""
        if self.me.ticket in self._gone:
            self._take_ticket()
            self.scan()

    def _look(self, ticket: int, before: dict[int, Member], now: float) -> Member | None:
        try:
            member = Member(**json.loads(self._member_path(ticket).read_text()))
        except (OSError, ValueError):  # not there yet, or not whole on a slow file system
            return before.get(ticket)
        if ticket == self.me.ticket:
            return member
        beat, since = self._seen.get(ticket, (-1, now))
        if member.beat != beat:
            self._seen[ticket] = (member.beat, now)
            if beat >= 0:  # seen as it came
                ahead = time.time() - member.wall
                self.skew_s[ticket] = min(ahead, self.skew_s.get(ticket, ahead))
        elif now - since > self._lease_s:
            self._gone.add(ticket)
        if member.left or (member.machine == _machine("pid") and not _runs(member)):
            self._gone.add(ticket)
        return None if ticket in self._gone else member

    def _take_ticket(self) -> None:
        folder = self.folder / "members"
        temporary = folder / f".new.{uuid.uuid4().hex}"
        while True:
            self.me.ticket = max((int(p.stem) for p in folder.glob("*.json")), default=0) + 1
            temporary.write_text(json.dumps(asdict(self.me)))
            with suppress(FileExistsError):
                os.link(temporary, self._member_path(self.me.ticket))
                temporary.unlink()
                return

    def _member_path(self, ticket: int) -> Path:
        return self.folder / "members" / f"{ticket:06d}.json"


def _add(attempt: Attempt, kind: str, content: dict[str, Any]) -> None:
    if kind == "report":
        failures = [Failure(**failure) for failure in content["failures"]]
        attempt.reports[content["node"]] = Report(**{**content, "failures": failures})
    elif kind == "resize":
        attempt.resize = True
    elif kind == "meet":
        attempt.meet = content
    elif kind == "alarm":
        attempt.alarm = content


def newest_checkpoint(run_dir: Path) -> list[Any]:
    """Return stage folder (empty without stages) and step of the run's newest checkpoint."""
    found = [["", -1]]
    for path in [*run_dir.glob("checkpoints/step-*"), *run_dir.glob("stages/*/checkpoints/step-*")]:
        step = path.name.removeprefix("step-")
        if step.isdigit():
            stage = path.parts[-3] if path.parts[-4:-3] == ("stages",) else ""
            found.append([stage, int(step)])
    return max(found)


def own_address(rendezvous: str, alone: bool) -> str:
    """Return the address at which other machines reach this one.

    Debian gives a machine's own name an address of the loopback interface. So a name that leads
    there is only used if nothing else is known.

    Args:
        rendezvous: ``HOST`` or ``HOST:PORT``; the address is that of the interface towards it.
            Empty takes the interface of the default route, and without one this machine's name.
        alone: Whether no other machine takes part.

    Raises:
        ValueError: ``rendezvous`` is unknown.
    """
    if alone and not rendezvous:
        return LOOPBACK
    host = rendezvous.rpartition(":")[0] or rendezvous
    if host:
        try:
            address = _address_towards(host)
        except OSError as error:
            text = f"launch.rendezvous={rendezvous}: {host} is unknown: {error}"
            raise ValueError(text) from error
        if not is_loopback(address) or host == "localhost" or is_loopback(host):
            return address
    for target in (_ANYWHERE, socket.gethostname()):
        with suppress(OSError):
            return _address_towards(target)
    return LOOPBACK


def _address_towards(host: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing; the kernel picks the interface
        return probe.getsockname()[0]


def is_loopback(address: str) -> bool:
    """Return whether an address means the machine itself, whoever uses it."""
    return address.startswith("127.")


def interface_of(address: str) -> str:
    """Return the name of the network interface that has ``address``; empty if none has."""
    for _, name in socket.if_nameindex():
        request = struct.pack("256s", name.encode()[:15])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            found = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)[20:24]
            if socket.inet_ntoa(found) == address:
                return name
    return ""


def free_port(attempt: int) -> int:
    """Return a port nobody listens on, outside the range from which the kernel gives ports away."""
    start = 20000 + (os.getpid() * 61 + attempt * 17) % 9000
    for port in range(start, start + 3000):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise OSError(f"no free port from {start} to {start + 3000}")


def _machine(namespace: str) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink(f'/proc/self/ns/{namespace}')}"


def _runs(member: Member) -> bool:
    try:
        letter, started = process_start(member.pid)
    except ProcessLookupError:
        return False
    return started == member.started and letter not in "ZX"

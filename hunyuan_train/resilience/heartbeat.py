"""What each rank is doing now: a small record in shared memory that a monitor on its node reads.

Free of torch. The record is a memory-mapped file, so it outlives its process and costs no system
call; a monitor on another machine would read it late or never.
"""

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from hunyuan_train.resilience.stacks import dump_on_signal

PHASES = {
    "start": 0,  # imports, process group, model, restore
    "loop": 1,  # between two updates: metrics, agreement to stop
    "save": 2,
    "evaluate": 2,
    "data": 3,
    "forward": 4,
    "backward": 5,
    "update": 6,
    "collective": -1,  # waits for others on purpose; keeps the place of the phase around it
    "failed": 8,  # ends with an exception
    "done": 9,
}
"""Order of the phases between two beats."""

_NAMES = list(PHASES)
_HEAD = struct.Struct("=8siiIQQi")
_SLOT = struct.Struct("=QdqiBBI24sdddddQ")
_MAGIC = b"beat\0\0\0\1"
_SLOTS = (128, 256)
_SIZE = 384
UNUSUAL = 2
"""The first times of a phase in a bucket tell nothing: compilation, first buffers."""

_STEP_DECAY, _PHASE_DECAY = 0.02, 0.1


def health_folder(run_dir: str | Path, attempt: int) -> Path:
    """Return where the ranks of an attempt keep their records and stack dumps."""
    return Path(run_dir) / "health" / f"attempt-{attempt}"


def beat_path(run_dir: str | Path, attempt: int, rank: int) -> Path:
    """Return the record of a rank."""
    return health_folder(run_dir, attempt) / f"rank-{rank}.beat"


def stacks_path(run_dir: str | Path, attempt: int, rank: int) -> Path:
    """Return the stack dumps of a rank."""
    return health_folder(run_dir, attempt) / f"rank-{rank}.stacks"


def process_start(pid: int) -> tuple[str, int]:
    """Return state letter and start time, in clock ticks since boot, of a process.

    Pid and start time together name a process for good; a pid alone is used again.

    Raises:
        ProcessLookupError: there is none.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"no process {pid}") from None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return fields[0], int(fields[19])


@dataclass(frozen=True, slots=True, kw_only=True)
class Beat:
    """One whole reading of a rank's record."""

    rank: int
    node: int
    pid: int
    started: int
    """Start time of the process, see :func:`process_start`."""
    main_thread: int
    signal: int
    """Signal that dumps the stacks, 0 if none does."""
    marks: int
    """Phases marked so far: it changes when the rank gets on."""
    time: float
    """Of the last mark, on the node's monotonic clock."""
    step: int
    """Updates done."""
    micro_step: int
    """Forwards begun since then."""
    place: int
    """Furthest phase since then, as in :data:`PHASES`."""
    phase: str
    bucket: str
    count: int
    """Times that this phase in this bucket is over."""
    typical_s: float
    """Most seconds that this phase took in this bucket lately; 0 while unknown."""
    typical_step_s: float
    """Most seconds that an update took lately, without unusual ones; 0 while unknown."""
    step_s: float
    """Seconds of the last update."""
    busy: float
    cost: float
    """Own seconds and predicted cost of all updates so far, see :meth:`Heartbeat.beat`."""

    @property
    def progress(self) -> tuple[int, int, int, bool]:
        """How far the rank is, to compare with others; who waits on purpose is further."""
        return self.step, self.micro_step, self.place, self.phase == "collective"


class _Kind:
    """A phase in a bucket: how it is written, how often it came, how long it takes."""

    __slots__ = ("bucket", "count", "number", "place", "typical_s")

    def __init__(self, phase: str, bucket: str) -> None:
        self.number, self.place = _NAMES.index(phase), PHASES[phase]
        self.bucket = bucket.encode("ascii", "replace")[:24]
        self.count, self.typical_s = 0, 0.0


class _Restore:
    """Goes back to the phase before at the end of a ``with`` block."""

    __slots__ = ("_beat", "_kind")

    def __init__(self, beat: "Heartbeat", kind: _Kind) -> None:
        self._beat, self._kind = beat, kind

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # An exception keeps its phase: that is where the rank dies or hangs.
        if error is None:
            self._beat._mark(self._kind)


class Heartbeat:
    """Writes the record of one rank; one thread of the rank uses it.

    As a context manager it ends in phase done, or failed after an exception: then the rank may end.
    A process that ends without either is dead.

    A record has two slots that are written in turn, each between two copies of its number. A reader
    takes the newest slot whose copies agree, so a process stopped in the middle of a write leaves
    the reading before it.
    """

    def __init__(
        self, run_dir: str | Path, attempt: int, rank: int, *, node: int = 0, stacks: bool = True
    ) -> None:
        """Make the record, in phase start, and have the stacks dumped on a signal.

        Args:
            run_dir: Folder of the run.
            attempt: Number of this start of all ranks.
            rank: Of this process.
            node: Number of the machine.
            stacks: Whether a signal dumps the stacks; it must be asked for in the main process.
        """
        path = beat_path(run_dir, attempt, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        number = dump_on_signal(stacks_path(run_dir, attempt, rank)) if stacks else 0
        pid = os.getpid()
        head = _HEAD.pack(
            _MAGIC, rank, node, pid, process_start(pid)[1], threading.main_thread().ident or 0,
            number,
        )  # fmt: skip
        new = path.with_suffix(f".{pid}")
        new.write_bytes(head.ljust(_SIZE, b"\0"))
        with new.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _SIZE)
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._marks, self._step, self._micro_step, self._place = 0, 0, 0, 0
        self._step_s, self._busy, self._cost = 0.0, 0.0, 0.0
        self._typical_step_s, self._unusual = 0.0, True
        self._since, self._cpu_s, self._data_s = time.monotonic(), time.thread_time(), 0.0
        self._kind = self._kinds["start", ""] = _Kind("start", "")
        self._mark(self._kind)
        os.replace(new, path)

    def phase(self, name: str, bucket: str = "") -> _Restore:
        """Say what this rank does from now on.

        As a statement it holds until the next one; as ``with heartbeat.phase("save"):`` the phase
        before comes back at the end. Every ``forward`` is a new micro-step.

        Args:
            name: One of :data:`PHASES`.
            bucket: What it works on, like 17x256x256; at most 24 letters are kept.
        """
        before = self._kind
        kind = self._kinds.get((name, bucket))
        if kind is None:
            kind = self._kinds[name, bucket] = _Kind(name, bucket)
        if name == "forward":
            self._micro_step += 1
            self._place = 0
        self._mark(kind)
        return _Restore(self, before)

    def resume(self, step: int) -> None:
        """Say that ``step`` updates were done before this attempt; failures are told by step."""
        self._step = step
        self.phase("start")

    def beat(
        self, step: int, seconds: float, *, busy_s: float | None = None, cost: float = 1.0
    ) -> None:
        """Say that update ``step`` is done.

        Args:
            step: Updates done so far.
            seconds: Of this update, waiting included.
            busy_s: Seconds of it in which this rank worked and did not wait for others. None takes
                the processor time of the calling thread plus the time it waited for its data,
                which is right where collectives sleep while they wait (gloo).
            cost: Predicted cost of this rank's work in this update, in any unit that is the same
                on all ranks.
        """
        cpu_s = time.thread_time()
        self._busy += cpu_s - self._cpu_s + self._data_s if busy_s is None else busy_s
        self._cpu_s, self._data_s = cpu_s, 0.0
        self._cost += cost
        self._step, self._micro_step, self._place, self._step_s = step, 0, 0, seconds
        if not self._unusual:
            self._typical_step_s = _envelope(self._typical_step_s, seconds, _STEP_DECAY)
        self._unusual = False
        self.phase("loop")

    def __enter__(self) -> "Heartbeat":
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say that this rank ended as it should, or with an exception."""
        self.phase("done" if error is None else "failed", self._kind.bucket.decode())

    def _mark(self, kind: _Kind) -> None:
        now = time.monotonic()
        last = self._kind
        seconds = now - self._since
        last.count += 1
        if last.count > UNUSUAL:
            last.typical_s = _envelope(last.typical_s, seconds, _PHASE_DECAY)
        else:
            self._unusual = True
        if last.number == _DATA:
            self._data_s += seconds
        if kind.place > self._place:
            self._place = kind.place
        self._kind, self._since = kind, now
        self._marks = marks = self._marks + 1
        _SLOT.pack_into(
            self._memory, _SLOTS[marks & 1], marks, now, self._step, self._micro_step,
            self._place, kind.number, kind.count, kind.bucket, kind.typical_s,
            self._typical_step_s, self._step_s, self._busy, self._cost, marks,
        )  # fmt: skip


_DATA = _NAMES.index("data")


def _envelope(before: float, value: float, decay: float) -> float:
    """Follow a value up at once and down slowly: what happens now and then is usual, too."""
    return value if value > before else before + decay * (value - before)


def read_beat(path: Path) -> Beat | None:
    """Return what a rank last wrote, None while it has not written anything.

    Raises:
        ValueError: the file is no record of this version.
    """
    try:
        with path.open("rb", buffering=0) as file:
            data = file.read(_SIZE)
            for _ in range(100):
                # The same bytes twice: no write came in between, so a slot is whole if its two
                # numbers agree, and if not its writer stopped there and the other one is whole.
                file.seek(0)
                again = file.read(_SIZE)
                if again == data:
                    break
                data = again
    except FileNotFoundError:
        return None
    if len(data) != _SIZE or not data.startswith(_MAGIC):
        raise ValueError(f"{path} is no heartbeat of this version; remove the folder it is in")
    slots = [_SLOT.unpack_from(data, offset) for offset in _SLOTS]
    whole = [slot for slot in slots if slot[0] == slot[-1]]
    if not whole:
        return None
    (
        marks, marked, step, micro, place, number, count, bucket, typical_s, typical_step_s,
        step_s, busy, cost, _,
    ) = max(whole)  # fmt: skip
    _, rank, node, pid, started, thread, dump_signal = _HEAD.unpack_from(data)
    return Beat(
        rank=rank, node=node, pid=pid, started=started, main_thread=thread, signal=dump_signal,
        marks=marks, time=marked, step=step, micro_step=micro, place=place, phase=_NAMES[number],
        bucket=bucket.rstrip(b"\0").decode("ascii"), count=count, typical_s=typical_s,
        typical_step_s=typical_step_s, step_s=step_s, busy=busy, cost=cost,
    )  # fmt: skip

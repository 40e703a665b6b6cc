"""Claims: which process works on what, in a folder that machines may share.

Each name has a lock file. The kernel's lock on it excludes the other processes of a machine and is
released when a process ends in any way. Many shared file systems pass it on to other machines, but
some do so only with a mount option (Lustre, BeeGFS) and grant it everywhere without. So the file
also says who holds it and counts up as long as that process lives: a claim of another machine is
respected until the count has stood still for :data:`LEASE_S`, by the clock of whoever looks.
"""

import errno
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

LEASE_S = 60.0
BEAT_S = 5.0
_RETRY_S = 0.2
_NOTES = 16
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Claim:
    """A name that this process holds until :meth:`release`."""

    def __init__(self, descriptor: int, owner: str, notes: list[str]) -> None:
        self.notes = notes
        """What holders wrote down for those who come after them, oldest first."""
        self._descriptor = descriptor
        self._owner = owner
        self._beats = 0
        self._lock = threading.Lock()
        self._write()

    def beat(self) -> None:
        """Show other machines that the holder is alive."""
        with self._lock:
            if self._descriptor >= 0:
                self._beats += 1
                self._write()

    def release(self, note: str = "") -> None:
        """Let others have it; ``note`` is for them."""
        with self._lock:
            if note:
                self.notes = [*self.notes, note][-_NOTES:]
            self._owner = ""
            try:
                self._write()
            finally:
                os.close(self._descriptor)
                self._descriptor = -1

    def _write(self) -> None:
        record = {"owner": self._owner, "beats": self._beats, "notes": self.notes}
        text = json.dumps(record).encode() + b"\n"
        os.pwrite(self._descriptor, text, 0)
        os.ftruncate(self._descriptor, len(text))
        os.fsync(self._descriptor)


class Claims:
    """The claims of one process on the names of a folder.

    Args:
        folder: Where the lock files are; it exists.
        machine: What tells this machine from others; by default the identity of its last start.
        lease_s: How long another machine's claim is respected without a sign of life.
    """

    def __init__(self, folder: Path, machine: str = "", lease_s: float = LEASE_S) -> None:
        self._folder = folder
        self._machine = machine or _this_machine()
        self._lease_s = lease_s
        self._watched: dict[str, tuple[tuple[str, int], float]] = {}
        self._held: set[Claim] = set()
        self._beating: threading.Thread | None = None
        self._closed = threading.Event()

    def take(self, name: str) -> Claim | None:
        """Claim ``name``, or return None while another process holds it.

        Raises:
            ValueError: The file system has no locks.
        """
        descriptor = os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            raise ValueError(
                f"{self._folder} is on a file system without file locks ({error.strerror}), by "
                "which processes share work; mount it with them (Lustre: -o flock), or put the "
                "store elsewhere"
            ) from error
        record = _read(descriptor)
        owner = str(record.get("owner", ""))
        if self._lives(name, owner, int(record.get("beats", 0))):
            os.close(descriptor)
            return None
        claim = Claim(descriptor, self._machine, list(record.get("notes", [])))
        self._held.add(claim)
        self._keep_beating()
        return claim

    def release(self, claim: Claim, note: str = "") -> None:
        """Give ``claim`` back."""
        self._held.discard(claim)
        claim.release(note)

    def close(self) -> None:
        """Give all claims back and stop showing life."""
        self._closed.set()
        for claim in tuple(self._held):
            self.release(claim)

    @contextmanager
    def waiting_for(self, name: str) -> Iterator[Claim]:
        """Hold ``name`` for the body of a ``with`` statement, once others have released it."""
        while not (claim := self.take(name)):
            time.sleep(_RETRY_S)
        try:
            yield claim
        finally:
            self.release(claim)

    def _lives(self, name: str, owner: str, beats: int) -> bool:
        """Return whether the claim written in a file whose lock was granted is to be respected.

        On this machine the lock says all: a holder that is gone has left only its record.
        """
        if owner in ("", self._machine):
            return False
        now = time.monotonic()
        seen, since = self._watched.get(name, (("", -1), now))
        if seen != (owner, beats):
            since = now
        self._watched[name] = ((owner, beats), since)
        return now - since < self._lease_s

    def _keep_beating(self) -> None:
        if self._beating is None:
            self._beating = threading.Thread(target=self._beat, name="claims", daemon=True)
            self._beating.start()

    def _beat(self) -> None:
        while not self._closed.wait(min(BEAT_S, self._lease_s / 4)):
            for claim in tuple(self._held):
                with suppress(OSError):  # a full or absent disk is reported by who writes data
                    claim.beat()


def _read(descriptor: int) -> dict[str, Any]:
    try:
        record = json.loads(os.pread(descriptor, 1 << 16, 0) or b"{}")
    except ValueError:  # the holder was killed while it wrote
        return {}
    return record if isinstance(record, dict) else {}


@cache
def _this_machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"{uuid.getnode():x}"

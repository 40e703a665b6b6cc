"""Files in a memory file system that hold one rank's part of a snapshot and outlive its process.

A rank writes its snapshots to ``rank-<r>.a`` and ``.b`` in turn; copies that a node keeps for ranks
of another node are ``rank-<r>.copy.a`` and ``.b``. A file is one page of header and then the
payload. Free of torch.
"""

import errno
import hashlib
import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

PAGE = 4096
_MAGIC = b"HYSNAP01"
_STATE = struct.Struct("<Q")
_HEADER = struct.Struct("<II")
"""Length and checksum of the text that follows."""
_WRITING, _COMPLETE = 0, 0x434F4D504C455445
_PIECE = 4 << 20
_SPARE = 1 << 16
"""Room for counters that grow."""
_SHARED_MEMORY = "/dev/shm"

Stamp = tuple[str, int]
"""Lineage and step: parts with the same stamp belong together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What a slot holds: one rank's part of one snapshot."""

    run: str
    """Identity of the run, not of its folder's path."""
    lineage: str
    """Of the attempt that took it; parts of different attempts never go together."""
    layout: str
    """Digest of how the state is cut, and of anything else that must be the same."""
    plan: str
    """Digest of names, shapes and types of this rank's tensors."""
    world: int
    rank: int
    step: int
    tensor_bytes: int
    """The tensors, padded, are the begin of the payload."""
    counter_bytes: int
    """The counters, as JSON, are the rest."""
    digest: str
    """xxh3 (128 bits) of the payload."""

    @property
    def payload_bytes(self) -> int:
        """Size of tensors and counters."""
        return self.tensor_bytes + self.counter_bytes

    @property
    def stamp(self) -> Stamp:
        """What all parts of a snapshot share."""
        return self.lineage, self.step


class Slot:
    """One file, mapped. At any moment it is whole or says that it is not."""

    def __init__(self, path: Path) -> None:
        """Open or make the file; to write, ``reserve``, ``begin``, fill and ``complete`` it."""
        self.path = path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
        self.mapped: mmap.mmap | None = None

    def reserve(self, num_bytes: int) -> bool:
        """Make room for a payload; what the slot holds stays.

        Returns:
            Whether the file was mapped anew, so that views of the old mapping are stale.

        Raises:
            OSError: There is no room: without the check, writing would kill the process.
        """
        if self.mapped is not None and len(self.mapped) >= PAGE + num_bytes:
            return False
        descriptor = self._file.fileno()
        size = -(-(PAGE + num_bytes + _SPARE) // mmap.PAGESIZE) * mmap.PAGESIZE
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            raise OSError(
                error.errno, f"{self.path.parent} has no room for {size >> 20} MiB"
            ) from error
        self.mapped = mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        return True

    def begin(self) -> None:
        """Say that the payload is being written and that what was there is gone."""
        os.pwrite(self._file.fileno(), _MAGIC + _STATE.pack(_WRITING), 0)

    def payload(self, num_bytes: int) -> memoryview:
        """Return the live bytes of the payload, after :meth:`reserve`."""
        assert self.mapped is not None
        return memoryview(self.mapped)[PAGE : PAGE + num_bytes]

    def complete(self, part: Part) -> None:
        """Describe the payload, then say that it is whole."""
        assert self.mapped is not None
        text = json.dumps(asdict(part)).encode()
        begin = len(_MAGIC) + _STATE.size
        assert begin + _HEADER.size + len(text) <= PAGE
        _HEADER.pack_into(self.mapped, begin, len(text), zlib.crc32(text))
        begin += _HEADER.size
        self.mapped[begin : begin + len(text)] = text
        _STATE.pack_into(self.mapped, len(_MAGIC), _COMPLETE)

    def close(self) -> None:
        """Close the file; views of the payload keep its mapping alive."""
        self._file.close()
        self.mapped = None


class SlotPair:
    """Slots a and b of one rank, or of the copies kept for one."""

    def __init__(self, folder: Path, rank: int, *, copy: bool) -> None:
        """Prepare; no file is made yet."""
        stem = f"rank-{rank}.copy" if copy else f"rank-{rank}"
        self._paths = [folder / f"{stem}.{which}" for which in "ab"]
        self._slots: dict[Path, Slot] = {}

    def free(self, keep: Stamp | None) -> Slot:
        """Return the slot to overwrite: one that does not hold the snapshot ``keep``."""
        first, second = self._paths
        part = read_part(first)
        path = second if part is not None and part.stamp == keep else first
        return self._open(path)

    def reserve(self, num_bytes: int) -> None:
        """Make room in both slots ahead of the first snapshot.

        Raises:
            OSError: There is not enough.
        """
        for path in self._paths:
            self._open(path).reserve(num_bytes)

    def _open(self, path: Path) -> Slot:
        if path not in self._slots or not path.exists():
            self._slots[path] = Slot(path)
        return self._slots[path]

    def close(self) -> None:
        """Close both files."""
        for slot in self._slots.values():
            slot.close()
        self._slots.clear()


def read_part(path: Path) -> Part | None:
    """Return what a slot holds; None if that is not whole. The payload is not read."""
    try:
        with path.open("rb", buffering=0) as file:
            page = file.read(PAGE)
            size = os.fstat(file.fileno()).st_size
    except OSError:
        return None
    begin = len(_MAGIC) + _STATE.size
    if len(page) < PAGE or page[: len(_MAGIC)] != _MAGIC:
        return None
    if _STATE.unpack_from(page, len(_MAGIC))[0] != _COMPLETE:
        return None
    length, checksum = _HEADER.unpack_from(page, begin)
    text = page[begin + _HEADER.size :][:length]
    if zlib.crc32(text) != checksum:
        return None
    try:
        part = Part(**json.loads(text))
    except (TypeError, ValueError):  # of another version
        return None
    return part if size >= PAGE + part.payload_bytes else None


def read_payload(path: Path, part: Part) -> memoryview:
    """Return the payload of a slot without checking it.

    Raises:
        OSError: The file is gone or holds something else by now.
    """
    with path.open("rb", buffering=0) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if read_part(path) != part:
        raise OSError(errno.ESTALE, f"{path} does not hold step {part.step} of rank {part.rank}")
    return memoryview(mapped)[PAGE : PAGE + part.payload_bytes]


def stored_parts(folder: Path) -> Iterator[tuple[Path, Part]]:
    """Yield all whole parts in a node's folder, own and copies."""
    for path in sorted(folder.glob("rank-*.[ab]")):
        part = read_part(path)
        if part is not None:
            yield path, part


def remove_parts(folder: Path, keep: Stamp | None = None) -> None:
    """Delete the slots of a node's folder, save those of the snapshot ``keep``."""
    for path in sorted(folder.glob("rank-*.[ab]")):
        part = read_part(path)
        if keep is None or part is None or part.stamp != keep:
            path.unlink(missing_ok=True)
    if keep is None:
        with suppress(OSError):  # not there, or something else is in it
            folder.rmdir()


def digest_payload(payload: memoryview) -> str:
    """Return the digest of a payload; other threads run meanwhile."""
    digest = xxhash.xxh3_128()
    for begin in range(0, len(payload), _PIECE):
        digest.update(payload[begin : begin + _PIECE])
    return digest.hexdigest()


def node_folder(run_dir: str | Path, snapshot_dir: str, node: int) -> Path:
    """Return where the snapshots of a run lie on a node.

    Args:
        run_dir: Folder of the run, of which the name is made.
        snapshot_dir: ``resilience.snapshot_dir``; ``{node}`` in it becomes the number of the node,
            so that a test can keep apart nodes of one machine.
        node: Number of the node.
    """
    name = hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:16]
    root = snapshot_dir.replace("{node}", str(node)) or _SHARED_MEMORY
    return Path(root) / f"hunyuan-{name}"


def run_identity(run_dir: str | Path, fresh: str) -> str:
    """Return the identity of the run in a folder; one without gets ``fresh``.

    A run that begins anew in an emptied folder is another run. Only one rank calls it.
    """
    path = Path(run_dir) / "run_id"
    with suppress(FileNotFoundError):
        if identity := path.read_text().strip():
            return identity
    path.parent.mkdir(parents=True, exist_ok=True)
    begun = path.with_suffix(".begun")
    begun.write_text(fresh + "\n")
    begun.replace(path)
    return fresh

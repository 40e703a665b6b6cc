"""What a checkpoint folder holds, and how to tell a good one from a damaged one.

A checkpoint is a folder ``step-00000020`` with the files of torch.distributed.checkpoint
(``__<rank>_0.distcp`` and ``.metadata``) and ``manifest.json``: the size and SHA-256 of every file,
the model's identity and the counters. It is written under ``step-00000020.incomplete`` and renamed
when everything is on disk, so a folder without that suffix was once complete.
"""

import json
import os
import re
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from hunyuan_train.checkpoint.digest import HashingStream, hash_file, hash_json

MANIFEST = "manifest.json"
METADATA = ".metadata"
INCOMPLETE = ".incomplete"
DAMAGED = ".damaged"
REFUSED = ".refused"
_FORMAT = 2
_READABLE = (1, 2)
"""Format 1 had neither digests nor a score."""
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """Size and content of one file when it was written."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Damage:
    """Why a checkpoint cannot be used."""

    file: str
    reason: str
    certain: bool = True
    """False if another try may succeed, e.g. after an I/O error."""

    def __str__(self) -> str:
        """Return one clause for a message."""
        return f"{self.file} {self.reason}"


class DamagedCheckpointError(ValueError):
    """A checkpoint folder is not what was written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The content of ``manifest.json``."""

    step: int
    """Updates done."""
    identity: dict[str, Any]
    """The model's configuration; a checkpoint only fits a model with the same."""
    extra: dict[str, Any]
    """Counters and loader state."""
    files: dict[str, FileRecord]
    """Every other file of the folder, by name."""
    world_size: int
    """Ranks that wrote it, for information: any number can read it."""
    digests: dict[str, str] = field(default_factory=dict)
    """Digest of every whole tensor by flat name, the same in every layout; empty if not asked."""
    score: float | None = None
    """Held-out loss when it was written, for retention; lower is better."""

    def write(self, folder: Path) -> None:
        """Write and fsync the manifest of ``folder``."""
        body = {"format": _FORMAT, **asdict(self)}
        with (folder / MANIFEST).open("w") as stream:
            json.dump({**body, "sha256": hash_json(body)}, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of ``folder``.

        Raises:
            DamagedCheckpointError: It is missing, is not JSON, or its own hash does not fit.
        """
        path = folder / MANIFEST
        try:
            body = json.loads(path.read_text())
            stored = body.pop("sha256")
        except FileNotFoundError:
            raise DamagedCheckpointError(f"{path} is missing") from None
        except (ValueError, KeyError, AttributeError) as error:
            raise DamagedCheckpointError(f"{path} is not a manifest: {error}") from error
        if stored != hash_json(body):
            raise DamagedCheckpointError(f"{path} was changed: its own hash does not fit")
        if body.pop("format") not in _READABLE:
            raise ValueError(f"{path} was written by another version of hunyuan_train")
        files = {name: FileRecord(**record) for name, record in body.pop("files").items()}
        return cls(files=files, **body)


class _HashingFileSystem(FileSystem):
    """The file system of torch's writer, recording size, hash and failure of each file."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}
        self.error: OSError | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        with Path(path).open(mode) as raw:
            stream = HashingStream(cast(BinaryIO, raw))
            try:
                yield stream
                stream.flush()
            finally:
                self.error = self.error or stream.error
            self.records[Path(path).name] = FileRecord(
                num_bytes=stream.num_bytes, sha256=stream.hexdigest()
            )

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class HashingWriter(FileSystemWriter):
    """torch's checkpoint writer, with an fsync and a :class:`FileRecord` per file."""

    def __init__(self, folder: Path) -> None:
        """Write into ``folder``, one file per rank."""
        super().__init__(folder, single_file_per_rank=True, sync_files=True, overwrite=True)
        self._hashing = _HashingFileSystem()
        self.fs = self._hashing

    @property
    def records(self) -> dict[str, FileRecord]:
        """Files this rank has written."""
        return self._hashing.records

    @property
    def error(self) -> OSError | None:
        """The first failure of the file system on this rank."""
        return self._hashing.error


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of a complete checkpoint."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step of a complete checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def list_steps(root: Path) -> list[int]:
    """Return the steps of all committed checkpoints under ``root``, oldest first."""
    if not root.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in root.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in matches if match)


def fsync_folder(folder: Path) -> None:
    """Force the names in ``folder`` to disk; without it a rename may be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(
    folder: Path, manifest: Manifest, names: Iterable[str], *, hashes: bool
) -> list[Damage]:
    """Compare the files ``names`` of ``folder`` with the manifest.

    Args:
        folder: A checkpoint.
        manifest: Its manifest.
        names: Files to look at, so that ranks can share the work.
        hashes: Read the files and compare their content too.
    """
    found: list[Damage] = []
    for name in names:
        record, path = manifest.files[name], folder / name
        try:
            size = path.stat().st_size
            if size < record.num_bytes:
                reason = f"is truncated: {size} of {record.num_bytes} bytes"
            elif size > record.num_bytes:
                reason = f"has {size} bytes instead of {record.num_bytes}"
            elif hashes and hash_file(path) != record.sha256:
                reason = f"has changed content: its SHA-256 is not {record.sha256[:12]}..."
            else:
                continue
            found.append(Damage(file=name, reason=reason))
        except FileNotFoundError:
            found.append(Damage(file=name, reason="is missing"))
        except OSError as error:
            found.append(Damage(file=name, reason=f"cannot be read: {error}", certain=False))
    return found

"""Parts: the unit in which precompute commits work, one tensor file and one list of entries.

A store folder holds::

    meta.json                    what the store was made with; names the index (written last)
    index-<digest>/              one row per sample; see index.py
    quarantine.jsonl             one row per file left out, with the reason
    parts/<part>.safetensors     tensors: <source key>/<row>/{mean,std}, <text key>/{pooled,states}
    parts/<part>.jsonl           what the part holds and where; its presence commits the part
    claims/<unit>.lock           who works on what; see claims.py

The tensors of a row, and of a text, lie next to each other, and the list has their place in the
file and the digest of their bytes, so that one read by position fetches all. A clip has ``stills``
too with ``data.condition_frames``: the moments of those frames, each encoded alone.

Every entry is named by a hash of everything it depends on, so a part never becomes wrong, only
unused; and a process that is killed leaves at most a tensor file without its list, which the next
run overwrites.
"""

import hashlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import xxhash
from safetensors.torch import save_file
from torch import Tensor

from hunyuan_train.data.claims import Claims

logger = logging.getLogger(__name__)

PARTS = "parts"
CLAIMS = "claims"
_STALE_S = 3600.0


@dataclass(kw_only=True, slots=True)
class Part:
    """Work that is committed in one go."""

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By source key: ``{"rows": [...]}`` or ``{"reason": ..., "detail": ...}``; committing adds
    to each row ``"latents": {"offset", "nbytes", "digest"}``."""
    texts: dict[str, dict[str, int]] = field(default_factory=dict)
    """By text key: ``{"tokens"}``, the valid ones; committing adds offset, nbytes and digest."""
    digests: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By file: size, mtime_ns, hashed_ns and sha256, so an untouched file is not read again."""
    tensors: dict[str, Tensor] = field(default_factory=dict)


class PartStore:
    """Reads and commits the parts of one folder; safe for several processes and threads at once.

    Where two parts hold the same entry, the one of the smaller name counts, so that all processes
    agree on which they need.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: dict[str, tuple[str, dict[str, Any]]] = {}
        """Source key -> (part name, entry)."""
        self.texts: dict[str, tuple[str, dict[str, int]]] = {}
        """Text key -> (part name, entry)."""
        self.digests: dict[str, tuple[str, dict[str, Any]]] = {}
        """File -> (part name, entry); the newest of several."""
        self._seen: set[str] = set()
        self._broken: set[str] = set()
        self._lock = threading.RLock()
        for name in (PARTS, CLAIMS):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.claims = Claims(folder / CLAIMS)

    @property
    def parts(self) -> frozenset[str]:
        """Names of the parts that were read and are whole."""
        return frozenset(self._seen)

    def refresh(self) -> None:
        """Read the parts that were committed since the last call; forget those that are gone."""
        with self._lock:
            with os.scandir(self.folder / PARTS) as found:
                listed = {file.name[:-6] for file in found if file.name.endswith(".jsonl")}
            # A shared file system may list a folder as it was some seconds ago: ask for the file.
            if any(not self._list(name).exists() for name in self._seen.difference(listed)):
                self._forget()
            for name in listed - self._seen:
                self._read(name)

    def read(self, name: str) -> None:
        """Read one part, unless it is known or has gone."""
        with self._lock:
            if name not in self._seen:
                self._read(name)

    def commit(self, part: Part) -> str:
        """Write ``part`` so that it exists completely or not at all; return its name.

        Raises:
            OSError: The disk is full or cannot be written; nothing half-written counts.
        """
        runs = _runs(part)
        for entry, keys in runs:
            digest = xxhash.xxh3_64()
            for key in keys:
                digest.update(_bytes_of(part.tensors[key]))
            entry["digest"] = digest.intdigest()
        # Named after the content, so that no list ever belongs to the tensors of another commit.
        name = key_of(json.dumps([part.sources, part.texts, part.digests], sort_keys=True))
        folder = self.folder / PARTS
        if part.tensors:
            with _replacing(folder / f"{name}.safetensors") as temporary:
                save_file({key: part.tensors[key].contiguous() for key in part.tensors}, temporary)
                _record_places(temporary, runs)
        entries: list[dict[str, Any]] = [
            *({"source": key, **entry} for key, entry in part.sources.items()),
            *({"text": key, **entry} for key, entry in part.texts.items()),
            *({"file": file, **digest} for file, digest in part.digests.items()),
        ]
        _sync_folder(folder)  # the list commits the part: it must not be there before the tensors
        write_lines(self._list(name), entries)
        with self._lock:
            self._read(name)
        return name

    def prune(self, used: set[str], known: frozenset[str]) -> None:
        """Delete the parts of ``known`` that are not in ``used``; call it when nobody commits.

        What is not in ``known`` may be the work of a process with a newer list of sources.
        """
        with self._lock:
            dropped = (self._seen & known | self._broken) - used
            for path in (self.folder / PARTS).iterdir():
                # A tensor file without a list that was read is a commit that another process may be
                # about to finish; what a killed one left is only recognisable by its age.
                name = path.name.split(".")[0]
                if name in dropped:
                    path.unlink(missing_ok=True)
                elif path.suffix != ".jsonl" and name not in self._seen:
                    with suppress(FileNotFoundError):
                        if time.time() - path.stat().st_mtime > _STALE_S:
                            path.unlink()
            if dropped:
                self._forget()

    def _forget(self) -> None:
        """Know nothing, as before the first :meth:`refresh`."""
        for known in (self._seen, self._broken, self.sources, self.texts, self.digests):
            known.clear()

    def _list(self, name: str) -> Path:
        return self.folder / PARTS / f"{name}.jsonl"

    def _read(self, name: str) -> None:
        try:
            lines = self._list(name).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:  # pruned by another process after the listing
            return
        entries = [json.loads(line) for line in lines]
        if not self._whole(name, entries):
            self._broken.add(name)
            return
        for entry in entries:
            if "file" in entry:
                file = entry.pop("file")
                known = self.digests.get(file)
                if known is None or known[1]["hashed_ns"] <= entry["hashed_ns"]:
                    self.digests[file] = (name, entry)
                continue
            kind, target = ("source", self.sources) if "source" in entry else ("text", self.texts)
            key = entry.pop(kind)
            if key not in target or name <= target[key][0]:
                target[key] = (name, entry)
        self._seen.add(name)
        self._broken.discard(name)

    def _whole(self, name: str, entries: list[dict[str, Any]]) -> bool:
        """Return whether the tensor file has all bytes that the list speaks of."""
        blobs = [row["latents"] for entry in entries for row in entry.get("rows", [])]
        blobs += [entry for entry in entries if "offset" in entry]
        if not blobs:
            return True
        tensors = self.folder / PARTS / f"{name}.safetensors"
        with suppress(FileNotFoundError):
            if tensors.stat().st_size >= max(blob["offset"] + blob["nbytes"] for blob in blobs):
                return True
        if name not in self._broken:
            logger.warning("%s is missing or cut short; what it held is made again", tensors)
        return False


def _runs(part: Part) -> list[tuple[dict[str, int], tuple[str, ...]]]:
    """Return the entries that describe several tensors, with the names of these, in file order."""
    runs: list[tuple[dict[str, int], tuple[str, ...]]] = []
    for key, entry in part.sources.items():
        for number, row in enumerate(entry.get("rows", [])):
            place = row["latents"] = {}
            names = (f"{key}/{number}/{kind}" for kind in ("mean", "std", "stills"))
            runs.append((place, tuple(name for name in names if name in part.tensors)))
    for key, entry in part.texts.items():
        runs.append((entry, (f"{key}/pooled", f"{key}/states")))
    return runs


def _bytes_of(tensor: Tensor) -> Any:
    return tensor.contiguous().flatten().view(torch.uint8).numpy()


def _record_places(path: Path, runs: list[tuple[dict[str, int], tuple[str, ...]]]) -> None:
    """Read from the header of a tensor file where the tensors of each entry lie."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    for entry, names in runs:
        places = [header[name]["data_offsets"] for name in names]
        for (_, end), (start, _) in pairwise(places):
            assert end == start, f"{names} are apart in {path}"
        entry["offset"], entry["nbytes"] = 8 + length + places[0][0], places[-1][1] - places[0][0]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write ``rows`` as JSON lines, complete or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, complete or not at all."""
    with _replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def key_of(*parts: str | Mapping[str, Any]) -> str:
    """Return a 20-digit hexadecimal hash of strings and JSON-able mappings."""
    text = "\x1f".join(
        part if isinstance(part, str) else json.dumps(part, sort_keys=True) for part in parts
    )
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _sync_folder(folder: Path) -> None:
    """Make sure that the files that were put into ``folder`` survive a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # safetensors files are private otherwise; stores are shared
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()

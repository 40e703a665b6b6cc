"""What encoders have made, on disk: by content and settings, of bounded size, safe from crashes.

An entry is one frame (see ``wire``), written beside its place and renamed, so that it is whole or
absent; one that a disk or a copy damaged fails its digest and is made again. Its name is a hash of
everything its numbers depend on, so an entry never becomes wrong, only unused. The time of its file
is that of its last use.
"""

import fcntl
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from hunyuan_train.data.wire import Garbled, pack, unpack

logger = logging.getLogger(__name__)

_KEPT_SHARE = 0.9
"""Of the limit, what a clean-up leaves."""
_CHECK_SHARE = 0.02
"""Of the limit, what one process may add until it looks again at what all have added."""
_USED_S = 60.0
"""An entry's last use is noted again after so long."""
_STALE_S = 3600.0


class Cache:
    """Tensors by key in a folder that any number of processes share.

    Args:
        folder: Where; made when the first entry is.
        limit: Most bytes; 0 keeps nothing.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self._limit = limit
        self._added = limit  # the first one looks
        self._lock = threading.Lock()

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return an entry, None if there is none that is whole."""
        if not self._limit:
            return None
        path = self._path(key)
        try:
            header, tensors = unpack(path.read_bytes())
            if header.get("key") != key:
                raise Garbled("it is another's")
            if time.time() - path.stat().st_mtime > _USED_S:
                os.utime(path)
        except FileNotFoundError:
            return None
        except (OSError, Garbled) as error:
            logger.warning("%s is no use (%s) and is made again", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep an entry; a full or broken disk is a warning, not an error."""
        frame = pack({"key": key}, tensors)
        if len(frame) > _KEPT_SHARE * self._limit:
            return
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(frame)
            temporary.replace(path)
        except OSError as error:
            logger.warning("%s cannot be kept: %s", path, error)
            with suppress(OSError):
                temporary.unlink()
        with self._lock:
            self._added += len(frame)
            if self._added > _CHECK_SHARE * self._limit:
                self._added = 0
                self._clean()

    @property
    def nbytes(self) -> int:
        """Bytes of all entries now; looks at every file."""
        return sum(size for _, size, _ in self._entries())

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.bin"

    def _entries(self) -> list[tuple[float, int, Path]]:
        found: list[tuple[float, int, Path]] = []
        for path in self.folder.glob("??/*"):
            with suppress(OSError):  # another process removes too
                stat = path.stat()
                found.append((stat.st_mtime, stat.st_size, path))
        return found

    def _clean(self) -> None:
        """Remove what was used least recently if all is above the limit; one process at a time."""
        with (self.folder / "clean.lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return
            entries = sorted(self._entries())
            total = sum(size for _, size, _ in entries)
            # What processes may add until they look again has to fit too.
            if total <= (1 - 2 * _CHECK_SHARE) * self._limit:
                return
            for used, size, path in entries:
                if total <= _KEPT_SHARE * self._limit:
                    break
                if path.suffix == ".tmp" and time.time() - used < _STALE_S:
                    continue  # another process is writing it
                with suppress(OSError):
                    path.unlink()
                total -= size


class Digests:
    """SHA-256 of source files by name, size and time, so that an untouched file is read once.

    They lie in one file of lines, to which all encoders append.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, tuple[int, int, str]] = {}
        self._read_to = 0
        self._looked = 0.0
        self._lock = threading.Lock()

    def get(self, file: str, stat: os.stat_result) -> str | None:
        """Return the digest of a file that is as it was, None if it was never read."""
        with self._lock:
            found = self._known.get(file)
            if found is None and time.monotonic() - self._looked > 1.0:
                self._refresh()
                found = self._known.get(file)
        if found is not None and found[:2] == (stat.st_size, stat.st_mtime_ns):
            return found[2]
        return None

    def put(self, file: str, stat: os.stat_result, digest: str) -> None:
        """Note the digest of a file that had ``stat`` before it was read."""
        line = json.dumps([file, stat.st_size, stat.st_mtime_ns, digest], ensure_ascii=False)
        with self._lock, suppress(OSError):  # it is read once more, then
            self._known[file] = (stat.st_size, stat.st_mtime_ns, digest)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8", errors="surrogatepass") as out:
                out.write(line + "\n")

    def _refresh(self) -> None:
        self._looked = time.monotonic()
        try:
            with self._path.open("rb") as file:
                file.seek(self._read_to)
                raw = file.read()
        except OSError:
            return
        whole = raw[: raw.rfind(b"\n") + 1]
        self._read_to += len(whole)
        for line in whole.decode("utf-8", "surrogatepass").splitlines():
            with suppress(ValueError):  # two processes wrote at once, on a disk that cannot do that
                name, size, mtime_ns, digest = json.loads(line)
                self._known[name] = (size, mtime_ns, digest)

"""What encoders have made, on disk: by content and settings, of bounded size, safe from crashes.

An entry is one frame (see ``wire``), written beside its place and renamed, so that it is whole or
absent; one that a disk or a copy damaged fails its digest and is made again. Its name is a hash of
everything its numbers depend on, so an entry never becomes wrong, only unused. The time of its file
is that of its last use.
"""

import fcntl
import logging
import os
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

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
        """Return the tensors of an entry, None if there is none that is whole."""
        found = self._read(key)
        return None if found is None else found[1]

    def noted(self, key: str) -> str | None:
        """Return what :meth:`note` noted, None if nothing."""
        found = self._read(key)
        return None if found is None else found[0].get("note")

    def note(self, key: str, text: str) -> None:
        """Keep a short text."""
        self.put(key, {}, text)

    def _read(self, key: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
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
        return header, tensors

    def put(self, key: str, tensors: Mapping[str, Tensor], note: str = "") -> None:
        """Keep an entry; a full or broken disk is a warning, not an error."""
        frame = pack({"key": key, "note": note}, tensors)
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
                # On a thread: it looks at every file.
                threading.Thread(target=self._clean, name="cache-clean", daemon=True).start()

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

"""Ranges of bytes of files in a local folder, or below any URL that fsspec knows."""

import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

logger = logging.getLogger(__name__)

PIECE = 1 << 18
"""Bytes handed out at once, so that the checks and the conversion find them in the CPU's cache."""
_OPEN_FILES = 64
_FIRST_WAIT_S = 0.5


class Blobs(Protocol):
    """Reads ranges of files by name; safe to use from several threads."""

    local: bool
    """Whether a request is cheap."""

    def pieces(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Yield a range in pieces of :data:`PIECE` bytes.

        A piece is valid until its thread asks for another one, of this or of any range.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: The range cannot be read, or the file ends before it does.
        """
        ...

    def size(self, name: str) -> int:
        """Return the size of a file in bytes.

        Raises:
            FileNotFoundError: There is no such file.
            OSError: It cannot be asked for.
        """
        ...

    def where(self, name: str) -> str:
        """Return the path or URL of a file, for messages."""
        ...


def open_blobs(location: str | Path, retries: int) -> Blobs:
    """Return the files below a folder or a URL.

    Args:
        location: Folder, or a URL such as ``s3://bucket/folder``.
        retries: Further attempts of a failed request to an object store.

    Raises:
        ValueError: fsspec does not know the protocol, or its package is not installed.
    """
    if "://" not in str(location):
        return LocalBlobs(Path(location))
    try:
        filesystem, path = fsspec.core.url_to_fs(str(location))
    except (ValueError, ImportError) as error:
        raise ValueError(f"{location} cannot be opened: {error}") from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalBlobs(Path(path))
    return RemoteBlobs(filesystem, path, retries)


def read_whole(blobs: Blobs, name: str) -> bytes:
    """Return a small file.

    Raises:
        FileNotFoundError: There is no such file.
        OSError: It cannot be read.
    """
    return b"".join(bytes(piece) for piece in blobs.pieces(name, 0, blobs.size(name)))


class ReadFile:
    """A file that is read at given places; closed with the last reference to it.

    Positioned reads instead of a memory map: they are as fast, and a file that shrinks or a disk
    that fails under a running job is an OSError, where a map would end the process.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, nbytes: int) -> bytes:
        """Return ``nbytes`` from ``offset``.

        Raises:
            OSError: It cannot be read, or ends before.
        """
        data = os.pread(self._descriptor, nbytes, offset)
        return data if len(data) == nbytes else self._rest(data, offset, nbytes)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset``.

        Raises:
            OSError: It cannot be read, or ends before.
        """
        done = os.preadv(self._descriptor, [buffer], offset)
        if done != len(buffer):
            head = bytes(buffer[:done])
            buffer[:] = self._rest(head, offset, len(buffer))

    def _rest(self, data: bytes, offset: int, nbytes: int) -> bytes:
        """Go on after a short read, which a network folder may give before the end of a file."""
        while len(data) < nbytes:
            more = os.pread(self._descriptor, nbytes - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self._path} ends at byte {offset + len(data)}")
            data += more
        return data

    def __del__(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)


class LocalBlobs:
    """The files of a folder, of which the last few dozen stay open."""

    local = True

    def __init__(self, folder: Path, max_open: int = _OPEN_FILES) -> None:
        self._folder = folder
        self._max_open = max_open
        self._lock = threading.Lock()
        self._files: OrderedDict[str, ReadFile] = OrderedDict()
        self._scratch = threading.local()

    def pieces(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Read into one buffer per thread; see :meth:`Blobs.pieces`."""
        file = self._open(name)
        scratch: memoryview | None = getattr(self._scratch, "piece", None)
        if scratch is None:
            scratch = self._scratch.piece = memoryview(bytearray(PIECE))
        for start in range(0, nbytes, PIECE):
            piece = scratch[: min(PIECE, nbytes - start)]
            file.read_into(piece, offset + start)
            yield piece

    def size(self, name: str) -> int:
        """See :meth:`Blobs.size`."""
        return (self._folder / name).stat().st_size

    def where(self, name: str) -> str:
        """See :meth:`Blobs.where`."""
        return str(self._folder / name)

    def _open(self, name: str) -> ReadFile:
        with self._lock:
            file = self._files.get(name)
            if file is not None:
                self._files.move_to_end(name)
                return file
        opened = ReadFile(self._folder / name)  # outside the lock: it may take long on a network
        with self._lock:
            file = self._files.setdefault(name, opened)
            if len(self._files) > self._max_open:
                self._files.popitem(last=False)  # closes when the last reader is through with it
            return file


class RemoteBlobs:
    """The files below a URL; a failed request is repeated, each time after twice the wait.

    Args:
        filesystem: An fsspec file system.
        root: Path in it.
        retries: Further attempts of a request.
        sleep: Waits for a number of seconds.
    """

    local = False

    def __init__(
        self,
        filesystem: Any,
        root: str,
        retries: int,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._retries = retries
        self._sleep = sleep
        self._lock = threading.Lock()
        self._warned: set[str] = set()
        self.retried = 0
        """Requests that were repeated so far."""

    def pieces(self, name: str, offset: int, nbytes: int) -> Iterator[memoryview]:
        """Ask for the whole range at once; see :meth:`Blobs.pieces`."""
        data = memoryview(self._persist(name, lambda path: self._range(path, offset, nbytes)))
        for start in range(0, nbytes, PIECE):
            yield memoryview(bytearray(data[start : start + PIECE]))  # torch wants to own it

    def size(self, name: str) -> int:
        """See :meth:`Blobs.size`."""
        return int(self._persist(name, self._filesystem.size))

    def where(self, name: str) -> str:
        """See :meth:`Blobs.where`."""
        return str(self._filesystem.unstrip_protocol(f"{self._root}/{name}"))

    def _range(self, path: str, offset: int, nbytes: int) -> bytes:
        data = self._filesystem.cat_file(path, start=offset, end=offset + nbytes)
        if len(data) != nbytes:
            raise OSError(f"the answer has {len(data)} bytes of the {nbytes} from byte {offset}")
        return data

    def _persist(self, name: str, request: Callable[[str], Any]) -> Any:
        wait_s = _FIRST_WAIT_S
        for attempt in range(self._retries + 1):
            try:
                return request(f"{self._root}/{name}")
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{self.where(name)} does not exist") from error
            except Exception as error:  # every object store has exceptions of its own
                if attempt == self._retries:
                    raise OSError(
                        f"{self.where(name)} cannot be read: {_cause(error)}, the last of "
                        f"{attempt + 1} attempts"
                    ) from error
                self._note(name, error, wait_s)
            self._sleep(wait_s)
            wait_s *= 2
        raise AssertionError("the last attempt returns or raises")

    def _note(self, name: str, error: Exception, wait_s: float) -> None:
        with self._lock:
            self.retried += 1
            first = name not in self._warned
            self._warned.add(name)
        if first:
            logger.warning(
                "reading %s failed (%s); trying again after %g s, up to %d times",
                self.where(name),
                _cause(error),
                wait_s,
                self._retries,
            )


def _cause(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"

"""SHA-256 of files and of JSON values, so `sha256sum` can check a checkpoint by hand."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any, BinaryIO

_CHUNK_BYTES = 4 << 20


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """Return the SHA-256 of a JSON value in hex, independent of key order and spacing."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class HashingStream(io.IOBase):
    """A write-only stream that hashes what passes, so a new file need not be read back."""

    def __init__(self, raw: BinaryIO) -> None:
        """Wrap ``raw``, which must be at its start and is only appended to."""
        self._raw = raw
        self._digest = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None
        """The first failure of the file system; torch reports it as an unrelated RuntimeError."""

    def write(self, data: Any) -> int:
        """Append ``data``."""
        try:
            self._raw.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._digest.update(data)
        size = memoryview(data).nbytes
        self.num_bytes += size
        return size

    def writable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self.num_bytes

    def fileno(self) -> int:
        """Return the descriptor, after flushing, because the caller wants to fsync it."""
        self.flush()
        return self._raw.fileno()

    def flush(self) -> None:
        """Flush ``raw``."""
        if self._raw.closed:
            return
        try:
            self._raw.flush()
        except OSError as error:
            self.error = self.error or error
            raise

    def hexdigest(self) -> str:
        """Return the SHA-256 of everything written."""
        return self._digest.hexdigest()

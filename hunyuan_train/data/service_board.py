"""Where encoders are found: a shared folder with one file per encoder process.

``encoder-<id>.json`` has address and token, and is readable by its owner alone. The encoder touches
it every second. What matters to others is that the time of the file moves, not which it is, so the
clocks of machines need not agree.
"""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

_STALE_S = 3600.0
"""Files that were not touched for so long are removed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """How one encoder process is reached."""

    id: str
    host: str
    port: int
    token: str
    """Random; who reads this file knows it, and nobody else can talk to the encoder."""
    settings: str
    """Hash of all settings that its numbers depend on."""
    node: str
    """Name of its machine."""
    pid: int
    device: str


class Board:
    """The folder of encoders; see the module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def post(self, entry: Entry) -> Path:
        """Register an encoder and return its file, which it has to touch."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob("encoder-*.json"):
            with suppress(OSError):
                if time.time() - old.stat().st_mtime > _STALE_S:
                    old.unlink()
        path = self.folder / f"encoder-{entry.id}.json"
        temporary = path.with_suffix(".tmp")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
            json.dump(asdict(entry), file)
        temporary.replace(path)
        return path

    def entries(self) -> list[tuple[Entry, int]]:
        """Return the encoders that registered and can be reached from here, with a mark each.

        The mark changes as long as the encoder lives.
        """
        found: list[tuple[Entry, int]] = []
        for path in sorted(self.folder.glob("encoder-*.json")):
            try:
                mark = path.stat().st_mtime_ns
                entry = Entry(**json.loads(path.read_text()))
            except (OSError, ValueError, TypeError):  # gone meanwhile, another's, another version's
                continue
            if entry.host != LOCAL or entry.node == socket.gethostname():
                found.append((entry, mark))
        return found


LOCAL = "127.0.0.1"
"""Host of encoders that serve their own machine alone."""

"""What became of each stage of a curriculum: ``curriculum.json``, beside the stage folders.

One process writes at a time, through a temporary file, so a kill leaves the old or the new ledger.
Branches that run as jobs of their own share it: each changes its own stages under a lock.
"""

import fcntl
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from hunyuan_train.config.root import RunConfig

log = logging.getLogger(__name__)

LEDGER_NAME = "curriculum.json"
_LOCK = "curriculum.lock"


class Status(StrEnum):
    """How far a stage is."""

    waiting = "waiting"
    running = "running"
    """Begun, and not known to be over: it may have been killed."""
    done = "done"


@dataclass(kw_only=True, slots=True)
class StageRecord:
    """One stage."""

    folder: str
    """Below the curriculum's folder."""
    after: str = ""
    """The stage it starts from."""
    state: Status = Status.waiting
    planned_ranks: int = 0
    """Ranks with distinct data that its updates are planned for, whatever ranks there are."""
    checkpoint: str = ""
    """Its last, below the curriculum's folder; empty until it is done."""
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    """Of images, over all ranks."""
    ended_by: str = ""
    """steps, samples, tokens or plateau."""
    started: float = 0.0
    """When it was first begun, seconds since 1970."""
    ended: float = 0.0
    attempts: list[list[float]] = field(default_factory=list)
    """[begin, end] of every start; the end of one that was killed is its last row of metrics."""

    @property
    def seconds(self) -> float:
        """What all its starts took together."""
        return sum(end - begin for begin, end in self.attempts)


@dataclass(kw_only=True, slots=True)
class Ledger:
    """The whole file."""

    identity: str = ""
    """Digest of the graph and of what decides the numbers of its stages."""
    stages: dict[str, StageRecord] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "Ledger":
        """Return the ledger of a curriculum, an empty one before its first start.

        Raises:
            ValueError: the file is not a ledger.
        """
        path = folder / LEDGER_NAME
        if not path.is_file():
            return cls()
        try:
            body = json.loads(path.read_text())
            records = {name: _record(entry) for name, entry in body["stages"].items()}
            return cls(identity=body["identity"], stages=records)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no ledger of this version ({error}); remove it to let finished stages "
                "be found by their checkpoints"
            ) from error

    def write(self, folder: Path) -> None:
        """Replace the file; the new one is on disk when this returns."""
        entries = {
            name: {**asdict(record), "seconds": record.seconds}
            for name, record in self.stages.items()
        }
        write_json(folder / LEDGER_NAME, {"identity": self.identity, "stages": entries})


def _record(entry: dict[str, Any]) -> StageRecord:
    entry = {name: value for name, value in entry.items() if name != "seconds"}
    return StageRecord(**{**entry, "state": Status(entry["state"])})


def write_json(path: Path, body: Any) -> None:
    """Write JSON through a temporary file, so that a kill never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as stream:
        json.dump(body, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


@contextmanager
def changing(folder: Path) -> Iterator[Ledger]:
    """Lend the ledger for the body of a ``with`` statement and write it after; no body waits long.

    The lock goes with its process. Where the storage has none, a warning says so.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked (%s): run branches one after the other", folder, error)
        ledger = Ledger.read(folder)
        yield ledger
        ledger.write(folder)


def stage_folder(cfg: RunConfig, name: str, ledger: Ledger | None = None) -> Path:
    """Return the folder of a stage: what the ledger says, else numbered in the order of the run."""
    folder = Path(cfg.run.dir)
    known = (ledger or Ledger.read(folder)).stages.get(name)
    if known is not None:
        return folder / known.folder
    return folder / "stages" / f"{cfg.curriculum.order().index(name) + 1:02d}-{name}"

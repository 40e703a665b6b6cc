"""How long the stages of precompute took, and what passed through them."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

STAGES = ("decode", "wait", "vae", "text", "write")
"""``decode`` reads and decodes files, on threads; ``wait`` is what the encoders waited for that;
``vae`` and ``text`` encode; ``write`` commits parts, on a thread beside the encoders."""


@dataclass(slots=True)
class Stage:
    """The sum over one stage of one process."""

    seconds: float = 0.0
    """Time in it; that of several threads adds up."""
    items: int = 0
    """Files decoded, clips encoded, captions encoded, or sources written."""
    nbytes: int = 0
    """Bytes of the files, of the pixels, or written."""

    def row(self) -> dict[str, float]:
        """Return seconds, items, items per second and megabytes per second."""
        rate = 1 / self.seconds if self.seconds else 0.0
        return {
            "seconds": round(self.seconds, 3),
            "items": self.items,
            "items_per_s": round(self.items * rate, 3),
            "mb_per_s": round(self.nbytes * rate / 1e6, 3),
        }


@dataclass(slots=True)
class Stages:
    """The stages of one process; several threads may add to them."""

    stages: dict[str, Stage] = field(default_factory=lambda: {name: Stage() for name in STAGES})
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def time(self, name: str, items: int = 0, nbytes: int = 0) -> Iterator[None]:
        """Add the time of the body of a ``with`` statement to a stage."""
        started = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - started, items, nbytes)

    def add(self, name: str, seconds: float, items: int = 0, nbytes: int = 0) -> None:
        """Add to a stage."""
        with self._lock:
            stage = self.stages[name]
            stage.seconds += seconds
            stage.items += items
            stage.nbytes += nbytes

    def rows(self) -> dict[str, dict[str, float]]:
        """Return :meth:`Stage.row` of every stage."""
        return {name: stage.row() for name, stage in self.stages.items()}

    def __str__(self) -> str:
        """Return the stages that took time on one line."""
        rows = [(name, row) for name, row in self.rows().items() if row["items"]]
        return ", ".join(
            f"{name} {row['seconds']:.1f} s "
            f"({row['items_per_s']:.1f}/s, {row['mb_per_s']:.1f} MB/s)"
            for name, row in rows
        )

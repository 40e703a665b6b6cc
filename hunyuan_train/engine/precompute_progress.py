"""How far precompute is over the whole list of sources, and what its processes measured."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hunyuan_train.data.parts import write_text
from hunyuan_train.engine.precompute_stages import STAGES
from hunyuan_train.engine.precompute_work import Worker
from hunyuan_train.observability.config import LoggingConfig
from hunyuan_train.observability.progress import Progress as Bar

STATS = "precompute.json"
"""Time and throughput of the stages, of each process of the last run and of all together."""
_LOOK_S = 2.0
_SHOW_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """How far all processes together are with the list of sources."""

    done: int
    """Sources with their result in the store."""
    found: int
    """Of these, done before this process began."""
    total: int
    encoded: int
    """Sources that this process encoded."""
    rejected: int
    seconds: float


class Tally:
    """Counts what is done, by this process or another one.

    Args:
        worker: This process's view of the store.
        total: Sources.
        missing: Sources of units that had something missing at the start.
        report: Called every few seconds, and at the end; None: nobody asks.
    """

    def __init__(
        self,
        worker: Worker,
        total: int,
        missing: int,
        report: Callable[[Progress], None] | None,
    ) -> None:
        self._worker = worker
        self._total = total
        self._found = total - missing
        self._before = len(worker.store.sources)
        self._report = report
        self._started = self._looked = time.monotonic()

    def moved(self) -> None:
        """Look at the store, if it is time to."""
        if self._report and time.monotonic() - self._looked >= _LOOK_S:
            self._worker.store.refresh()
            new = len(self._worker.store.sources) - self._before
            self._tell(min(self._found + max(new, 0), self._total))
            self._looked = time.monotonic()

    def finished(self) -> None:
        """Tell that all is done."""
        self._tell(self._total)

    def _tell(self, done: int) -> None:
        if self._report:
            self._report(
                Progress(
                    done=done,
                    found=self._found,
                    total=self._total,
                    encoded=self._worker.encoded,
                    rejected=self._worker.rejected,
                    seconds=time.monotonic() - self._started,
                )
            )


@contextmanager
def display(cfg: LoggingConfig, rank: int) -> Iterator[Callable[[Progress], None]]:
    """Show progress with the time left: a bar on a terminal, elsewhere a line every few seconds."""
    bars: list[Bar] = []
    shown = 0.0

    def show(progress: Progress) -> None:
        nonlocal shown
        if not bars:
            bar = Bar(cfg, progress.total, rank, start_step=progress.found, label="precompute")
            bars.append(bar.__enter__())
        now = time.monotonic()
        bars[0].advance(progress.done)
        if now - shown >= _SHOW_S or progress.done == progress.total:
            shown = now
            rate = (progress.done - progress.found) / max(progress.seconds, 1e-9)
            bars[0].show(progress.done, {"sources_per_s": rate})

    try:
        yield show
    finally:
        for bar in bars:
            bar.__exit__(None, None, None)


def write_stages(worker: Worker, process: int, began: float, at_rest: bool) -> None:
    """Add this process's stages to the store's file; call it with the store's ``index`` claimed.

    Args:
        worker: What was measured.
        process: Index of this process.
        began: Unix time at which it began.
        at_rest: Whether an earlier run was complete then: its processes drop out, unless this one
            has found nothing to do.
    """
    if at_rest and not (worker.encoded or worker.rejected or worker.texts):
        return
    path = worker.store.folder / STATS
    try:
        records = json.loads(path.read_text(encoding="utf-8"))["processes"]
    except (FileNotFoundError, ValueError, KeyError):
        records = {}
    kept = {name: row for name, row in records.items() if row["ended"] >= began or not at_rest}
    ended = time.time()
    kept[str(process)] = {
        "began": round(began, 3),
        "ended": round(ended, 3),
        "encoded": worker.encoded,
        "rejected": worker.rejected,
        "captions": worker.texts,
        "stages": worker.stages.rows(),
    }
    rows = list(kept.values())
    seconds = max(row["ended"] for row in rows) - min(row["began"] for row in rows)
    encoded = sum(row["encoded"] for row in rows)
    total = {
        "seconds": round(seconds, 3),
        "encoded": encoded,
        "sources_per_s": round(encoded / max(seconds, 1e-9), 3),
        "stages": {name: _added([row["stages"][name] for row in rows]) for name in STAGES},
    }
    write_text(path, json.dumps({"total": total, "processes": kept}, indent=2) + "\n")


def _added(rows: list[dict[str, float]]) -> dict[str, float]:
    """Add the rows of one stage; rates are those of the processes together."""
    return {name: round(sum(row[name] for row in rows), 3) for name in rows[0]}

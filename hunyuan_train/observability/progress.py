"""What the first rank shows while it trains: a live bar on a terminal, log lines elsewhere."""

import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from hunyuan_train.observability.config import LoggingConfig, ProgressKind

log = logging.getLogger(__name__)


def format_duration(seconds: float) -> str:
    """Return seconds as 45s, 12m05s, 3h20m or 2d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def format_row(row: Mapping[str, float | int | str]) -> str:
    """Return the metrics people watch on one line; those missing in ``row`` are left out."""
    forms = {
        "sources_per_s": "{:.2f} sources/s",
        "loss": "loss {:.4f}",
        "grad_norm": "norm {:.3f}",
        "lr": "lr {:.2e}",
        "tokens_per_s": "{:,.0f} tok/s",
        "tflops": "{:.3g} TFLOP/s",
        "mfu": "MFU {:.1%}",
        "hfu": "HFU {:.1%}",
        "data_wait": "data wait {:.1%}",
    }
    return "  ".join(form.format(row[name]) for name, form in forms.items() if name in row)


class Progress:
    """Shows step, metrics and the time left; a context manager."""

    def __init__(
        self,
        cfg: LoggingConfig,
        total_steps: int,
        rank: int = 0,
        *,
        start_step: int = 0,
        label: str = "train",
    ) -> None:
        """Prepare.

        Args:
            cfg: Which form.
            total_steps: Updates at which the run ends.
            rank: This process; ranks above 0 show nothing.
            start_step: Updates done before, which do not count for the time left.
            label: Name in front, e.g. of the stage.
        """
        kind = cfg.progress
        if kind is ProgressKind.auto:
            kind = ProgressKind.bar if sys.stderr.isatty() else ProgressKind.lines
        self._kind = kind if rank == 0 else ProgressKind.off
        self._total, self._start, self._label = total_steps, start_step, label
        self._started_s = time.monotonic()
        self._bar: Bar | None = None

    def __enter__(self) -> "Progress":
        """Start the clock and the bar."""
        self._started_s = time.monotonic()
        if self._kind is ProgressKind.bar:
            from rich.console import Console

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[metrics]}"),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(
                self._label, total=self._total, completed=self._start, metrics=""
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop the bar."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, step: int) -> None:
        """Move the bar to ``step`` without new metrics; costs nothing otherwise."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step)

    def eta_s(self, step: int) -> float:
        """Return the seconds left at the mean speed so far, infinite before the first step."""
        done = step - self._start
        if done <= 0:
            return float("inf")
        return (time.monotonic() - self._started_s) / done * (self._total - step)

    def show(self, step: int, row: Mapping[str, float | int | str]) -> None:
        """Show the metrics of ``step``."""
        if self._kind is ProgressKind.off:
            return
        eta = self.eta_s(step)
        left = f"  ETA {format_duration(eta)}" if eta < float("inf") else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=format_row(row) + left)
        else:
            log.info("%s %d/%d  %s%s", self._label, step, self._total, format_row(row), left)

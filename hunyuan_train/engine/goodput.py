"""Where the time of a run went: as text, as a JSON file and as a chart in its folder."""

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hunyuan_train.evaluation.report import Table as ReportTable
from hunyuan_train.evaluation.timeline import timeline_chart
from hunyuan_train.resilience.events import FILE_NAME, read_events
from hunyuan_train.resilience.goodput import Goodput, Use, account
from hunyuan_train.resilience.interval import Copies, best, kept_share

JSON_NAME = "goodput.json"
CHART_NAME = "goodput.png"

TITLES = {
    Use.useful: "useful updates",
    Use.data: "waiting for data",
    Use.save: "checkpoint stall",
    Use.snapshot: "snapshot stall",
    Use.evaluate: "evaluation, comparing ranks",
    Use.start: "start-up",
    Use.restore: "restore",
    Use.detection: "detection of failures",
    Use.restart: "ending a failed attempt",
    Use.lost: "lost work",
    Use.idle: "idle between attempts",
    Use.other: "other",
    Use.unknown: "unknown",
}
"""In the order of the table and the chart."""

_COLOURS = (
    "#4a9d5b", "#e3b56b", "#3b6fb6", "#8fb0dc", "#7a5fb0", "#4f9aa8", "#9fd0d8", "#b6483b",
    "#d9822b", "#e08f84", "#c9ccd3", "#8b8f98", "#22252b",
)  # fmt: skip


def goodput_of(folder: Path) -> Goodput:
    """Return the account of the run in a folder.

    Raises:
        ValueError: there are no events, or none of training.
    """
    events = read_events(folder)
    if not events:
        raise ValueError(f"{folder / FILE_NAME} has no events; give run.dir the folder of a run")
    return account(events)


def write_goodput(folder: Path, found: Goodput) -> tuple[Path, Path]:
    """Write the JSON file and the chart into a run's folder and return their paths."""
    text = json.dumps(goodput_json(found), indent=2)
    (folder / JSON_NAME).write_text(text + "\n", encoding="utf-8")
    (folder / CHART_NAME).write_bytes(goodput_chart(found))
    return folder / JSON_NAME, folder / CHART_NAME


def goodput_json(found: Goodput) -> dict[str, Any]:
    """Return the account as plain values."""
    return {
        "goodput": found.share,
        "begin": found.begin,
        "wall_s": found.wall_s,
        "seconds": {use.value: found.seconds[use] for use in TITLES},
        "steps": found.steps,
        "lost_steps": found.lost_steps,
        "refused_updates": found.refused,
        "attempts": found.attempts,
        "failures_by_kind": dict(Counter(failed.fault for failed in found.failures)),
        "failures": [asdict(failed) for failed in found.failures],
        "mean_detection_s": found.mean_s("detection_s"),
        "mean_recovery_s": found.mean_s("recovery_s"),
        "saves": found.saves,
        "restores": found.restores,
        "estimated_s": found.estimated_s,
        "advice": advice(found),
        "notes": found.notes,
    }


def goodput_chart(found: Goodput) -> bytes:
    """Return the timeline as a PNG."""
    begun: dict[int, float] = {}
    for span in found.spans:
        if span.uses.keys() != {Use.idle}:
            begun.setdefault(span.attempt, span.begin - found.begin)
    return timeline_chart(
        [
            (
                span.begin - found.begin,
                span.end - found.begin,
                {TITLES[use]: seconds for use, seconds in span.uses.items()},
            )
            for span in found.spans
        ],
        dict(zip(TITLES.values(), _COLOURS, strict=True)),
        attempts=list(begun.values()),
        failures=[(failed.time - found.begin, failed.fault) for failed in found.failures],
        title=f"goodput {found.share:.1%}: {found.seconds[Use.useful]:,.1f} s of "
        f"{found.wall_s:,.1f} s, {found.attempts} attempts, {len(found.failures)} failures",
    )


def goodput_text(found: Goodput, console: Console) -> None:
    """Print the account: where the time went, the counts, and what is not known."""
    table = Table(box=None, pad_edge=False)
    table.add_column("time went into")
    for name in ("seconds", "share"):
        table.add_column(name, justify="right")
    for name, seconds, share in _rows(found):
        table.add_row(name, seconds, share)
    table.add_section()
    table.add_row("wall-clock", f"{found.wall_s:,.1f}", "100.00 %")
    console.print(table)
    console.print()
    for line in [*_counts(found), *found.notes]:
        console.print(line, highlight=False, soft_wrap=True)


def goodput_table(folder: Path) -> ReportTable | None:
    """Return the section of a run's report, None where the events say too little."""
    try:
        found = goodput_of(folder)
    except ValueError:
        return None
    return ReportTable(
        title="Where the time went",
        columns=["time went into", "seconds", "share"],
        rows=_rows(found),
        note=" ".join([*_counts(found), *found.notes]),
        chart=goodput_chart(found),
    )


def failures_table(found: Goodput) -> ReportTable | None:
    """Return what failed and what it cost, one row each; None if nothing did."""
    if not found.failures:
        return None
    rows = [
        [
            f"{failed.time - found.begin:,.1f} s",
            failed.fault or "unnamed",
            f"{failed.detection_s:.2f} s",
            "" if failed.recovery_s is None else f"{failed.recovery_s:.1f} s",
            f"{failed.lost_s:.1f} s",
            failed.sentence,
        ]
        for failed in found.failures
    ]
    survived = sum(failed.recovery_s is not None for failed in found.failures)
    return ReportTable(
        title="Failures survived",
        columns=["after", "what", "noticed in", "training again in", "work done again", "detail"],
        rows=rows,
        note=f"{survived} of {len(rows)} were survived; updates refused by the guard: "
        f"{found.refused}.",
    )


def advice(found: Goodput) -> str:
    """Return the interval between checkpoints that loses least at what was measured, if any was."""
    training_s = sum(span.end - span.begin for span in found.spans if span.step >= 0)
    if not found.failures or not found.saves or found.seconds[Use.save] <= 0:
        return ""
    mtbf_s = training_s / len(found.failures)
    stall_s = found.seconds[Use.save] / found.saves
    now = Copies(stall_s=stall_s, every_s=training_s / found.saves)
    down_s = (found.mean_s("detection_s") or 0.0) + (found.mean_s("recovery_s") or 0.0)
    chosen = best(mtbf_s, now)
    return (
        f"A checkpoint stops training for {stall_s:.3g} s and {len(found.failures)} failures came "
        f"every {mtbf_s:,.0f} s of training: from the disk alone a save every "
        f"{chosen.every_s:,.1f} s of training loses least ({kept_share(mtbf_s, chosen, down_s):.1%}"
        f" useful by the model); now it is every {now.every_s:,.1f} s "
        f"({kept_share(mtbf_s, now, down_s):.1%})."
    )


def _rows(found: Goodput) -> list[list[str]]:
    return [
        [title, f"{found.seconds[use]:,.1f}", f"{found.seconds[use] / found.wall_s:.2%}"]
        for use, title in TITLES.items()
        if found.seconds[use] > 0 or use is Use.useful
    ]


def _counts(found: Goodput) -> list[str]:
    """Return the sentences below the table."""
    kinds = Counter(failed.fault or "unnamed" for failed in found.failures)
    named = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    lines = [
        f"Goodput {found.share:.2%}. Attempts: {found.attempts}. Failures: "
        f"{len(found.failures)}{f' ({named})' if named else ''}. Updates kept: {found.steps:,}, "
        f"lost: {found.lost_steps:,.1f}, refused: {found.refused}. Checkpoints: {found.saves}."
    ]
    detection_s, recovery_s = found.mean_s("detection_s"), found.mean_s("recovery_s")
    if detection_s is not None and recovery_s is not None:
        sources = ", ".join(f"{count} from {name}" for name, count in found.restores.items())
        lines.append(
            f"On average a failure was noticed after {detection_s:.2f} s, and {recovery_s:.1f} s "
            f"later training went on{f' (restored: {sources})' if sources else ''}."
        )
    if text := advice(found):
        lines.append(text)
    if found.estimated_s:
        lines.append(
            f"{found.estimated_s:,.1f} s are split by the mean of the updates before them: what a "
            "process did in its last seconds is not written down when it is killed."
        )
    return lines

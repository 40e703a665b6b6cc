"""The report of a training run: one HTML file that needs nothing beside it, and one JSON file.

``report.json`` holds every figure. ``report.html`` shows the same figures with charts and playing
samples, all embedded, so it can be mailed, archived and opened offline.
"""

import base64
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from hunyuan_train.evaluation.charts import Points, bar_chart, curve_chart
from hunyuan_train.evaluation.video import write_mp4, write_png

Figures = Mapping[str, Any]
"""Figure name to number, text or a further mapping of figures; NaN where nothing was measured."""

SCORES = {
    "prompt_following": "trained",
    "untrained": "untrained",
    "chance": "chance",
    "ceiling": "real clips through the VAE",
}
"""Figure groups that hold a share per aspect, and the names of their bars."""

STAGE_COLUMNS = {
    "steps": ("steps", "{:,.0f}"),
    "loss": ("loss at the end", "{:.4f}"),
    "loss_start": ("loss at the start", "{:.4f}"),
    "seconds": ("seconds", "{:,.0f}"),
    "samples": ("samples", "{:,.0f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "tflops": ("TFLOP/s", "{:.3f}"),
    "data_wait": ("data wait", "{:.1%}"),
    "peak_gib": ("peak GiB", "{:.2f}"),
}
"""Columns of the table of stages: key in ``report.json`` to heading and number format."""


@dataclass(frozen=True, kw_only=True)
class StageCurves:
    """One training stage: its name and the rows of its ``metrics.jsonl``."""

    name: str
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, name: str, path: Path) -> "StageCurves":
        """Read a ``metrics.jsonl``.

        Raises:
            ValueError: if the file is missing, or holds a line that is not JSON.
        """
        if not path.is_file():
            raise ValueError(f"stage {name} has no metrics at {path}; train it before the report")
        rows = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error.msg}); delete the line"
                ) from error
        return cls(name=name, rows=rows)

    def points(self, key: str) -> Points:
        """Return (step, value) of the rows that hold a finite value of ``key``."""
        return [(row["step"], row[key]) for row in self.rows if _finite(row.get(key))]

    def figures(self) -> dict[str, float | str]:
        """Return the stage's figures for ``report.json``; what was not measured is left out.

        ``loss`` is the mean over the last tenth of the rows, because single rows are noisy; rates
        are means weighted by the steps of each row; ``samples`` is the last count.
        """
        result: dict[str, float | str] = {"name": self.name}
        losses = [value for _, value in self.points("loss")]
        if losses:
            tail = losses[-max(1, len(losses) // 10) :]
            result |= {"loss_start": losses[0], "loss": sum(tail) / len(tail)}
        for key in ("step", "samples", "peak_gib"):
            values = [value for _, value in self.points(key)]
            if values:
                result["steps" if key == "step" else key] = max(values)
        steps = self._steps_per_row()
        for key in ("tokens_per_s", "tflops", "mfu", "hfu", "data_wait"):
            weighted = [
                (row[key], count)
                for row, count in zip(self.rows, steps, strict=True)
                if _finite(row.get(key))
            ]
            total = sum(count for _, count in weighted)
            if total:
                result[key] = sum(value * count for value, count in weighted) / total
        seconds = [
            row["step_s"] * count
            for row, count in zip(self.rows, steps, strict=True)
            if _finite(row.get("step_s"))
        ]
        if seconds:
            result["seconds"] = sum(seconds)
        return result

    def _steps_per_row(self) -> list[float]:
        steps = [0.0, *(float(row["step"]) for row in self.rows)]
        return [max(after - before, 0.0) for before, after in pairwise(steps)]


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """Clips shown side by side under one heading."""

    title: str
    videos: Sequence[Tensor]
    """Pixels [3, F, H, W] in [-1, 1] each; sizes may differ."""

    captions: Sequence[str]
    """One per clip."""

    verdicts: Sequence[Mapping[str, bool]] = ()
    """Per clip what was judged right and wrong in it, or nothing at all."""

    note: str = ""
    """A sentence under the heading."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under a heading."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    """A sentence under the heading."""

    chart: bytes = b""
    """A PNG above the rows; empty for none."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything a report shows; whatever is empty is left out of it."""

    title: str
    intro: str = ""
    figures: Figures = field(default_factory=dict)
    """Goes into ``report.json`` as it is. Groups named in ``SCORES`` also become bars."""

    targets: Mapping[str, float] = field(default_factory=dict)
    """Share per scored aspect that counts as reached."""

    opening: Sequence[Table] = ()
    """Shown first: the whole in one look."""

    stages: Sequence[StageCurves] = ()
    grids: Sequence[SampleGrid] = ()
    tables: Sequence[Table] = ()
    extra_curves: Mapping[str, Mapping[str, Points]] = field(default_factory=dict)
    """Heading to further curves by name, for example the VAE's training."""

    settings: Mapping[str, str] = field(default_factory=dict)
    """What ran on what: shown as a table at the end."""

    fps: int = 8


def write_report(folder: Path, report: Report) -> Path:
    """Write ``report.html`` and ``report.json`` into a folder and return the path of the first.

    Args:
        folder: where to write; made if missing.
        report: what to show.

    Raises:
        ValueError: if a grid's captions or verdicts do not match its clips.
    """
    for grid in report.grids:
        if len(grid.videos) != len(grid.captions) or len(grid.verdicts) not in (
            0,
            len(grid.videos),
        ):
            raise ValueError(
                f"sample grid {grid.title!r} has {len(grid.videos)} clips, {len(grid.captions)} "
                f"captions and {len(grid.verdicts)} verdicts; give one of each per clip"
            )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    data = {**report.figures, "stages": [stage.figures() for stage in report.stages]}
    text = json.dumps(_without_nan(data), indent=2)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    path = folder / "report.html"
    path.write_text(_page(report), encoding="utf-8")
    return path


def _page(report: Report) -> str:
    sections = [
        _scores(report),
        _numbers(report),
        *(_table(table) for table in report.opening),
        _stages(report),
        *(_grid(grid, report.fps) for grid in report.grids),
        *(_table(table) for table in report.tables),
        *(
            _section(heading, _image(curve_chart(series, x_label="step", y_label="", log_y=True)))
            for heading, series in report.extra_curves.items()
        ),
        _settings(report),
    ]
    intro = f"<p class=intro>{escape(report.intro)}</p>" if report.intro else ""
    body = "\n".join(section for section in sections if section)
    template = Path(__file__).with_name("report.html.template").read_text(encoding="utf-8")
    for name, value in (("TITLE", escape(report.title)), ("INTRO", intro), ("BODY", body)):
        template = template.replace(f"<!--{name}-->", value)
    return template


def _scores(report: Report) -> str:
    groups = {name: report.figures[name] for name in SCORES if name in report.figures}
    if "prompt_following" not in groups:
        return ""
    aspects = list(groups["prompt_following"])
    bars = {
        SCORES[name]: [float(scores.get(aspect, math.nan)) for aspect in aspects]
        for name, scores in groups.items()
    }
    targets = [report.targets.get(aspect, math.nan) for aspect in aspects]
    chart = bar_chart(
        aspects,
        bars,
        y_label="right",
        targets=targets if report.targets else None,
    )
    return _section("Prompt following", _image(chart))


def _numbers(report: Report) -> str:
    flat = {
        name: value
        for name, value in report.figures.items()
        if isinstance(value, int | float | str) and name not in SCORES
    }
    if not flat:
        return ""
    cards = "".join(
        f"<div class=card><b>{escape(_format(value))}</b><span>{escape(name.replace('_', ' '))}"
        "</span></div>"
        for name, value in flat.items()
    )
    return f"<div class=cards>{cards}</div>"


def _stages(report: Report) -> str:
    if not report.stages:
        return ""
    figures = [stage.figures() for stage in report.stages]
    columns = {key: spec for key, spec in STAGE_COLUMNS.items() if any(key in f for f in figures)}
    head = "".join(f"<th>{escape(heading)}</th>" for heading, _ in columns.values())
    rows = "".join(
        f"<tr><td>{escape(str(row['name']))}</td>"
        + "".join(
            f"<td class=n>{form.format(row[key]) if key in row else ''}</td>"
            for key, (_, form) in columns.items()
        )
        + "</tr>"
        for row in figures
    )
    table = f"<div class=wide><table><tr><th>stage</th>{head}</tr>{rows}</table></div>"
    charts = "".join(
        _image(curve_chart(series, x_label="step", y_label=label, end_to_end=True))
        for key, label in (("loss", "loss"), ("tokens_per_s", "latent tokens/s"))
        if any((series := {s.name: s.points(key) for s in report.stages}).values())
    )
    return _section("Training, stage after stage", charts + table)


def _grid(grid: SampleGrid, fps: int) -> str:
    if not grid.videos:
        return ""
    cells = []
    for number, (video, caption) in enumerate(zip(grid.videos, grid.captions, strict=True)):
        marks = "".join(
            f"<span class={'yes' if right else 'no'}>{escape(aspect)}</span>"
            for aspect, right in (grid.verdicts[number] if grid.verdicts else {}).items()
        )
        cells.append(
            f"<figure>{_clip(video, fps)}<figcaption>{escape(caption)}{marks}</figcaption></figure>"
        )
    note = f"<p>{escape(grid.note)}</p>" if grid.note else ""
    return _section(grid.title, f"{note}<div class=grid>{''.join(cells)}</div>")


def _table(table: Table) -> str:
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    head = "".join(f"<th>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    chart = _image(table.chart) if table.chart else ""
    body = f"<div class=wide><table><tr>{head}</tr>{rows}</table></div>"
    return _section(table.title, note + chart + body)


def _clip(video: Tensor, fps: int) -> str:
    """Return one clip as an HTML element with its bytes inside: a looping video or an image."""
    height, width = video.shape[2:]
    # Small samples are shown larger, with their pixels left as they are.
    shown = f"width={width * max(1, 160 // max(height, width))}"
    with tempfile.TemporaryDirectory() as scratch:
        if video.shape[1] == 1:
            data = write_png(Path(scratch) / "image.png", video).read_bytes()
            return f'<img {shown} alt="" src="{_inline(data, "image/png")}">'
        data = write_mp4(Path(scratch) / "clip.mp4", video, fps).read_bytes()
    return (
        f'<video {shown} autoplay loop muted playsinline src="{_inline(data, "video/mp4")}">'
        "</video>"
    )


def _settings(report: Report) -> str:
    if not report.settings:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>"
        for name, value in report.settings.items()
    )
    return _section("Settings", f"<div class=wide><table>{rows}</table></div>")


def _section(heading: str, content: str) -> str:
    return f"<section><h2>{escape(heading)}</h2>{content}</section>"


def _image(png: bytes) -> str:
    return f'<img class=chart alt="" src="{_inline(png, "image/png")}">'


def _inline(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _format(value: float | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else value


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _without_nan(value: Any) -> Any:
    """Return plain JSON values; JSON has no NaN, so what was not measured becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

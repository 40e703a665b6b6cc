"""Charts over the wall-clock of a run, drawn without a display and returned as PNG bytes."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_BINS = 1200
_DPI = 144
_LABELLED = 16
"""Failures that are named in the picture; more are only marked."""

Piece = tuple[float, float, Mapping[str, float]]
"""Begin and end in seconds, and the seconds in between by use."""


def timeline_chart(
    pieces: Sequence[Piece],
    colours: Mapping[str, str],
    *,
    attempts: Sequence[float],
    failures: Sequence[tuple[float, str]],
    title: str,
) -> bytes:
    """Draw the shares of the uses over time, and below it the seconds that were not useful.

    Args:
        pieces: What the time went into, in order, from 0 on.
        colours: Of each use in the order of stacking; the first is the useful one.
        attempts: When each attempt began.
        failures: When something failed, and what.
        title: Above the picture.
    """
    figure = Figure(figsize=(9.6, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=(3, 2))
    end = pieces[-1][1] if pieces else 1.0
    _shares(top, pieces, colours, end)
    _marks(top, attempts, failures, end)
    _losses(bottom, pieces, colours, end)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999")
        axes.tick_params(colors="#444", labelsize=8)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


@dataclass(frozen=True, kw_only=True, slots=True)
class StageBar:
    """One stage of a time line."""

    name: str
    after: str
    """The stage it starts from; empty for none."""
    pieces: Sequence[tuple[float, float]]
    """Begin and end of every start, in seconds from the begin of the chart."""
    done: bool


def stages_chart(bars: Sequence[StageBar], failures: Sequence[float]) -> bytes:
    """Draw every stage as bars on a line of its own, from what it starts from to where it ends.

    Args:
        bars: In the order they are listed, from the top.
        failures: When something failed, in seconds from the begin; marked on top.
    """
    figure = Figure(figsize=(9.6, 0.9 + 0.34 * len(bars)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ends = [end for bar in bars for _, end in bar.pieces]
    size, unit = _unit(max(ends, default=1.0))
    lines = {bar.name: line for line, bar in enumerate(bars)}
    for line, bar in enumerate(bars):
        colour = "#3b6fb6" if bar.done else "#e3b56b"
        for begin, end in bar.pieces:
            width = max(end - begin, max(ends) / 400)
            axes.barh(line, width / size, 0.62, left=begin / size, color=colour)
        source = bars[lines[bar.after]] if bar.after in lines else None
        if source is not None and source.pieces and bar.pieces:
            start, stop = source.pieces[-1][1] / size, bar.pieces[0][0] / size
            axes.plot([start, start, stop], [lines[bar.after], line, line], color="#999", lw=0.9)
    if failures:
        places = [at / size for at in failures]
        axes.plot(places, [-0.75] * len(places), "v", color="#b6483b", ms=5, clip_on=False)
    axes.set_yticks(range(len(bars)), [bar.name for bar in bars])
    axes.set_ylim(len(bars) - 0.4, -0.9 if failures else -0.6)
    axes.set_xlabel(f"wall-clock, {unit}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999")
    axes.tick_params(colors="#444", labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def _unit(seconds: float) -> tuple[float, str]:
    for size, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 3 * size:
            return size, name
    return 1.0, "seconds"


def _shares(axes: Axes, pieces: Sequence[Piece], colours: Mapping[str, str], end: float) -> None:
    """Fill the axes with the share of each use in each of many short times."""
    size, name = _unit(end)
    edges = np.linspace(0.0, end, _BINS + 1)
    floor = np.zeros(_BINS + 1)
    for use, colour in colours.items():
        # Seconds of this use before each edge: linear within a piece.
        times = np.array([0.0, *(stop for _, stop, _ in pieces)])
        sums = np.cumsum([0.0, *(uses.get(use, 0.0) for _, _, uses in pieces)])
        share = np.diff(np.interp(edges, times, sums)) * _BINS / end
        level = floor + np.append(share, share[-1])
        if share.any():
            axes.fill_between(
                edges / size, floor, level, step="post", color=colour, lw=0, label=use
            )
        floor = level
    axes.set_xlim(0, end / size)
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    axes.set_xlabel(f"wall-clock, {name}", fontsize=8)
    axes.legend(fontsize=7, frameon=False, ncols=1, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _marks(
    axes: Axes, attempts: Sequence[float], failures: Sequence[tuple[float, str]], end: float
) -> None:
    """Mark the begin of each attempt and each failure above the shares."""
    size, _ = _unit(end)
    axes.vlines([at / size for at in attempts], 1.0, 1.05, colors="#555", lw=0.8)
    if failures:
        places = [at / size for at, _ in failures]
        axes.plot(places, [1.08] * len(places), "v", color="#b6483b", ms=5, clip_on=False)
    for at, fault in failures if len(failures) <= _LABELLED else ():
        axes.annotate(
            fault, (at / size, 1.11), fontsize=6.5, color="#b6483b", rotation=35, ha="left",
            va="bottom", annotation_clip=False,
        )  # fmt: skip


def _losses(axes: Axes, pieces: Sequence[Piece], colours: Mapping[str, str], end: float) -> None:
    """Draw the seconds of each use but the first as bars."""
    names = [use for use in list(colours)[1:] if any(uses.get(use) for _, _, uses in pieces)]
    seconds = [sum(uses.get(use, 0.0) for _, _, uses in pieces) for use in names]
    places = np.arange(len(names))
    drawn = axes.barh(places, seconds, 0.75, color=[colours[use] for use in names])
    texts = [f"{value:,.1f} s, {value / end:.2%}" for value in seconds]
    axes.bar_label(drawn, texts, padding=3, fontsize=7, color="#444")
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.18)
    axes.set_xlabel("seconds that were not useful", fontsize=8)

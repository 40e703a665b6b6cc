"""The report's charts, drawn without a display and returned as PNG bytes."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

STAGE_COLOURS = ("#3b6fb6", "#d9822b", "#4a9d5b", "#b6483b", "#7a5fb0", "#4f9aa8")
BAR_COLOURS = ("#3b6fb6", "#c9ccd3", "#e3b56b", "#9bbf9f")
DPI = 144

Points = Sequence[tuple[float, float]]
"""(x, y) pairs in order of x."""


def curve_chart(
    series: Mapping[str, Points],
    *,
    x_label: str,
    y_label: str,
    end_to_end: bool = False,
    log_y: bool = False,
) -> bytes:
    """Draw named curves and return a PNG.

    A curve of more than 40 points is drawn faintly, with its moving mean over 5 % of it on top.

    Args:
        series: name to points; a name without points is left out of the picture.
        x_label: name and unit of x.
        y_label: name and unit of y.
        end_to_end: lay the curves one after the other along x, each on its own band; for stages
            that follow one another.
        log_y: logarithmic y; points at or below 0 are left out.
    """
    figure, (axes,) = figure_with(1, 8.6, 3.1)
    offset = 0.0
    for number, (name, points) in enumerate(series.items()):
        data = np.array([(x, y) for x, y in points if y > 0 or not log_y], dtype=float)
        if data.size == 0:
            continue
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        x, y = data[:, 0] + offset, data[:, 1]
        if end_to_end:
            axes.axvspan(offset, x[-1], color=colour, alpha=0.06, lw=0)
            offset = float(x[-1])
        if len(y) > 40:
            axes.plot(x, y, color=colour, lw=0.7, alpha=0.35)
            y = _moving_mean(y, max(3, len(y) // 20))
        marker = "o" if len(y) == 1 else None
        axes.plot(x, y, color=colour, lw=1.8, label=name, marker=marker)
    if log_y:
        axes.set_yscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.margins(x=0.01)
    _legend(axes, len(series))
    return png(figure)


def bar_chart(
    groups: Sequence[str],
    bars: Mapping[str, Sequence[float]],
    *,
    y_label: str,
    targets: Sequence[float] | None = None,
) -> bytes:
    """Draw shares in 0..1 as grouped bars with their percentage on top and return a PNG.

    Args:
        groups: names along x.
        bars: name of a bar to its value per group, NaN where there is none.
        y_label: name of the share.
        targets: share per group that counts as reached, drawn as a line across the group.
    """
    figure, (axes,) = figure_with(1, 8.6, 3.3)
    width = 0.8 / max(len(bars), 1)
    places = np.arange(len(groups), dtype=float)
    for number, (name, values) in enumerate(bars.items()):
        x = places - 0.4 + (number + 0.5) * width
        colour = BAR_COLOURS[number % len(BAR_COLOURS)]
        drawn = axes.bar(x, np.nan_to_num(values), width * 0.92, color=colour, label=name)
        texts = ["" if np.isnan(value) else f"{100 * value:.0f}%" for value in values]
        axes.bar_label(drawn, texts, padding=2, fontsize=8, color="#444")
    for place, target in zip(places, targets or [], strict=False):
        label = "target" if place == 0 else "_nolegend_"
        axes.hlines(
            target, place - 0.42, place + 0.42, colors="#222", lw=1.2, linestyles="--", label=label
        )
    axes.set_xticks(places, groups)
    axes.set_ylim(0, 1.12)
    axes.set_yticks(np.linspace(0, 1, 6), [f"{share}%" for share in range(0, 101, 20)])
    axes.set_ylabel(y_label)
    axes.grid(axis="x", visible=False)
    _legend(axes, len(bars) + bool(targets))
    return png(figure)


def figure_with(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many inches with empty axes side by side, in the report's style."""
    # The figure is made without pyplot: nothing global is left behind and no display is looked for.
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    found = [figure.add_subplot(1, panels, place + 1) for place in range(panels)]
    for axes in found:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#999")
        axes.grid(color="#e4e6ea", lw=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(colors="#444", labelsize=8)
    return figure, found


def _legend(axes: Axes, entries: int) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.figure.legend(
            loc="outside upper left", ncols=min(entries, 6), frameon=False, fontsize=8
        )


def _moving_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Return the centred mean over up to ``window`` values, same length."""
    half = window // 2
    sums = np.cumsum(np.insert(values, 0, 0.0))
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()

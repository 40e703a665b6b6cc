"""The picture of a scaling law: loss over compute, and the best size and tokens over compute."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hunyuan_train.evaluation.charts import STAGE_COLOURS, figure_with, png
from hunyuan_train.evaluation.scaling import BILLION, Curve, Optimum, PowerLaw, ScalingLaw, smooth

_TICKS = (1.0, 2.0, 5.0)
"""Labelled within each power of ten."""


def scaling_chart(curves: Sequence[Curve], optima: Sequence[Optimum], law: ScalingLaw) -> bytes:
    """Draw the runs' losses, the optima read off them and the fitted lines; return a PNG."""
    figure, panels = figure_with(3, 11.4, 3.4)
    losses, sizes, tokens = panels
    for number, curve in enumerate(sorted(curves, key=lambda curve: curve.params)):
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        losses.plot(curve.compute, curve.loss, color=colour, lw=0.6, alpha=0.35)
    for number, (curve, fit) in enumerate(
        sorted(zip(curves, smooth(curves), strict=True), key=lambda pair: pair[0].params)
    ):
        colour = STAGE_COLOURS[number % len(STAGE_COLOURS)]
        label = f"{curve.params / 1e6:,.3g} M"
        losses.plot(curve.compute, fit, color=colour, lw=1.6, label=label)
    losses.set_yscale("log")
    _label(losses, "loss")
    if curves:
        losses.legend(frameon=False, fontsize=7)
    _law(sizes, [(point.compute, point.size) for point in optima], law.size, "N")
    _law(tokens, [(point.compute, point.tokens) for point in optima], law.tokens, "D")
    return png(figure)


def _law(axes: Axes, points: Sequence[tuple[float, float]], law: PowerLaw, name: str) -> None:
    x, y = np.array(points).T
    axes.plot(x, y * BILLION, "o", ms=3, color=STAGE_COLOURS[0], alpha=0.5)
    ends = np.array([x.min() / 3, x.max() * 3])
    text = f"{law.factor:.3g} C^{law.exponent:.3f}"
    axes.plot(ends, [law(c) * BILLION for c in ends], color=STAGE_COLOURS[1], lw=1.4, label=text)
    axes.set_yscale("log")
    _label(axes, {"N": "best parameters N", "D": "best tokens D"}[name])
    axes.legend(frameon=False, fontsize=8)


def _label(axes: Axes, name: str) -> None:
    axes.set_xscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=_TICKS))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("compute 6 N D, petaFLOP")
    axes.set_ylabel(name)

"""Compute-optimal scaling: the model size and the tokens that a budget is best spent on.

From the loss curves of runs of several sizes to ``N_opt = a1 C^b1`` and ``D_opt = a2 C^b2``: at
each compute the best size is read off the runs (their envelope), and lines are fitted through the
logarithms (HunyuanVideo, arXiv 2412.03603, section 4.3; Hoffmann et al., arXiv 2203.15556). N
counts billions of parameters, D billions of tokens, C petaFLOP by ``C = 6 N D``, which leaves
attention out: a long video costs several times as much.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

FLOPS_PER_TOKEN = 6.0
"""Of a parameter, forward and backward."""
PETA = 1e15
BILLION = 1e9
_GRID = 120
_DECAYS = np.geomspace(0.02, 2.0, 60)
_MIN_POINTS = 8


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """``factor * C^exponent``."""

    factor: float
    exponent: float

    def __call__(self, compute: float) -> float:
        """Return the value at ``compute`` petaFLOP."""
        return self.factor * compute**self.exponent


@dataclass(frozen=True, slots=True)
class ScalingLaw:
    """What a budget is best spent on."""

    size: PowerLaw
    """Billions of parameters."""
    tokens: PowerLaw
    """Billions of tokens."""

    def budget_of(self, size: float) -> float:
        """Return the petaFLOP at which ``size`` billions of parameters are best."""
        return (size / self.size.factor) ** (1 / self.size.exponent)


PUBLISHED = {
    "image": ScalingLaw(PowerLaw(5.48e-4, 0.5634), PowerLaw(0.324, 0.4325)),
    "video": ScalingLaw(PowerLaw(0.0189, 0.3618), PowerLaw(0.0108, 0.6289)),
}
"""Laws of the HunyuanVideo report: text to image at 256 pixels, and text to video from there."""


@dataclass(frozen=True, slots=True)
class Curve:
    """The loss of one run while it trains."""

    params: float
    """Parameters."""
    tokens: np.ndarray
    """[n] trained on so far, increasing."""
    loss: np.ndarray
    """[n]."""

    @property
    def compute(self) -> np.ndarray:
        """[n] petaFLOP so far, ``6 N D``."""
        return FLOPS_PER_TOKEN * self.params * self.tokens / PETA


def smooth(curves: Sequence[Curve]) -> list[np.ndarray]:
    """Return the losses without their noise: ``e_i + b_i D^-beta`` by least squares.

    Each run has its own e and b; beta is the same for all, which is the usual form of the loss
    (arXiv 2203.15556, equation 2) and steadies short runs.
    """
    best: list[np.ndarray] = []
    smallest = np.inf
    for decay in _DECAYS:
        fits = []
        for curve in curves:
            falling = (curve.tokens / curve.tokens[-1]) ** -decay
            basis = np.stack([np.ones_like(falling), falling], axis=1)
            fits.append(basis @ np.linalg.lstsq(basis, curve.loss, rcond=None)[0])
        error = sum(
            float(np.square(fit - curve.loss).mean())
            for fit, curve in zip(fits, curves, strict=True)
        )
        if error < smallest:
            best, smallest = fits, error
    return best


@dataclass(frozen=True, slots=True)
class Optimum:
    """The best size at one compute."""

    compute: float
    """PetaFLOP."""
    size: float
    """Billions of parameters."""
    tokens: float
    """Billions of tokens."""

    @classmethod
    def of(cls, compute: float, params: float) -> Self:
        """Return the optimum of ``params`` parameters, with the tokens that the compute leaves."""
        tokens = compute * PETA / (FLOPS_PER_TOKEN * params)
        return cls(compute, params / BILLION, tokens / BILLION)


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a value lies in 95 % of the repetitions."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ScalingFit:
    """A law, how sure it is, and what it was read off."""

    law: ScalingLaw
    size_exponent: Interval
    tokens_exponent: Interval
    optima: list[Optimum]


def envelope(curves: Sequence[Curve]) -> list[Optimum]:
    """Read the best size off the runs at each compute that enough of them reach.

    The best of the sizes is refined by a parabola of the loss over log N through it and its
    neighbours. Where the smallest or largest size is best, the true optimum is outside and the
    point is left out.

    Args:
        curves: runs of different sizes.

    Raises:
        ValueError: too few sizes, or the runs' curves do not cross.
    """
    curves = sorted(curves, key=lambda curve: curve.params)
    if (count := len({curve.params for curve in curves})) < 3:
        raise ValueError(
            f"scaling.runs hold {count} model sizes; an envelope needs at least 3, better 5 or more"
        )
    fits = smooth(curves)
    logs = [(np.log(curve.compute), fit) for curve, fit in zip(curves, fits, strict=True)]
    low, high = min(x[0] for x, _ in logs), max(x[-1] for x, _ in logs)
    found: list[Optimum] = []
    for place in np.linspace(low, high, _GRID):
        reached = [i for i, (x, _) in enumerate(logs) if x[0] <= place <= x[-1]]
        if len(reached) < 3:
            continue
        losses = [float(np.interp(place, *logs[i])) for i in reached]
        best = int(np.argmin(losses))
        if 0 < best < len(reached) - 1:
            sizes = np.log([curves[i].params for i in reached])
            near = slice(best - 1, best + 2)
            size = _lowest(sizes[near] - sizes[best], np.array(losses[near]))
            if size is not None:
                params = float(np.exp(sizes[best] + size))
                found.append(Optimum.of(float(np.exp(place)), params))
    if len(found) < _MIN_POINTS:
        raise ValueError(
            f"the loss curves of scaling.runs cross at {len(found)} of {_GRID} budgets only, so no "
            "size in between is best; add sizes, or train the small ones longer"
        )
    return found


def _lowest(sizes: np.ndarray, losses: np.ndarray) -> float | None:
    """Return where the parabola through three points is lowest; None where it bends down."""
    bend, slope, _ = np.polyfit(sizes, losses, 2)
    return float(-slope / (2 * bend)) if bend > 0 else None


def fit_optima(optima: Sequence[Optimum]) -> ScalingLaw:
    """Fit both laws through the logarithms of the optima.

    Raises:
        ValueError: fewer than two budgets.
    """
    compute = np.log([point.compute for point in optima])
    if len(compute) < 2 or np.ptp(compute) == 0:
        raise ValueError("a scaling law needs the optima of at least two budgets")
    laws = []
    for values in ([point.size for point in optima], [point.tokens for point in optima]):
        exponent, constant = np.polyfit(compute, np.log(values), 1)
        laws.append(PowerLaw(float(np.exp(constant)), float(exponent)))
    return ScalingLaw(*laws)


def fit_curves(curves: Sequence[Curve], *, repetitions: int = 200, seed: int = 0) -> ScalingFit:
    """Fit the laws to loss curves, with 95 % intervals of the exponents by the bootstrap.

    A repetition adds to each fitted curve the deviations of the measured one from it, redrawn in
    blocks of the square root of their number, because neighbours are alike.

    Args:
        curves: runs of at least three sizes.
        repetitions: of the bootstrap; 0 leaves the intervals at the exponents.
        seed: of the redrawing.

    Raises:
        ValueError: the envelope cannot be read; see :func:`envelope`.
    """
    optima = envelope(curves)
    law = fit_optima(optima)
    generator = np.random.default_rng(seed)
    clean = list(zip(curves, smooth(curves), strict=True))
    drawn = [(law.size.exponent, law.tokens.exponent)]
    for _ in range(repetitions):
        again = [
            Curve(curve.params, curve.tokens, fit + _redrawn(curve.loss - fit, generator))
            for curve, fit in clean
        ]
        try:
            other = fit_optima(envelope(again))
        except ValueError:  # this repetition's curves do not cross
            continue
        drawn.append((other.size.exponent, other.tokens.exponent))
    low, high = np.percentile(np.array(drawn), [2.5, 97.5], axis=0).tolist()
    return ScalingFit(law, Interval(low[0], high[0]), Interval(low[1], high[1]), optima)


def _redrawn(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    block = max(1, int(len(values) ** 0.5))
    starts = generator.integers(0, len(values) - block + 1, size=-(-len(values) // block))
    return np.concatenate([values[start : start + block] for start in starts])[: len(values)]

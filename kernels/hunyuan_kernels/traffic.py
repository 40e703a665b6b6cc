"""Bytes that each op moves between chip and memory, keeps for its backward, and its FLOPs.

Closed forms, one line per pass over memory, for the fused kernels and for the eager PyTorch they
replace. Tensors of one value per row, sample or channel are left out where a term with E or D
values per row stands beside them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Bytes of one call; ``kept`` are those that only this op keeps for its backward."""

    forward: float
    backward: float
    kept: float

    @property
    def moved(self) -> float:
        """Bytes read and written, forward and backward."""
        return self.forward + self.backward


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """What an op costs fused and eager; ``flops`` are those of forward and backward together."""

    fused: Cost
    eager: Cost
    flops: float


def bytes_moved(op: str, shapes: Mapping[str, int], itemsize: int = 2) -> Traffic:
    """Return the traffic of ``op``.

    Args:
        op: name of an op.
        shapes: sizes by letter: ``B S D`` (norm_modulate, gated_residual), ``B S A E``
            (qk_norm_rope, lse_merge), ``B S D M`` (gelu_linear2; its output has D features), ``N``
            (adamw_ema: values of all parameters).
        itemsize: bytes of an activation, of a gradient for adamw_ema.

    Raises:
        ValueError: there is no such op.
    """
    if op not in _FORMULAS:
        raise ValueError(f"there is no fused op {op!r}; choose from {' '.join(_FORMULAS)}")
    return _FORMULAS[op](shapes, itemsize)


def _norm_modulate(n: Mapping[str, int], item: int) -> Traffic:
    values = n["B"] * n["S"] * n["D"]
    one = values * item
    # One sample: LayerNorm with an affine, whose backward reads x and the gradient twice. Several:
    # LayerNorm, then a product and a sum of its own, which need the normalised tokens kept.
    eager = (2, 5, 1) if n["B"] == 1 else (4, 10, 2)
    return Traffic(
        fused=Cost(forward=2 * one, backward=3 * one, kept=one),
        eager=Cost(forward=eager[0] * one, backward=eager[1] * one, kept=eager[2] * one),
        flops=22 * values,
    )


def _gated_residual(n: Mapping[str, int], item: int) -> Traffic:
    values = n["B"] * n["S"] * n["D"]
    one = values * item
    return Traffic(
        fused=Cost(forward=3 * one, backward=3 * one, kept=one),
        eager=Cost(forward=3 * one, backward=6 * one, kept=one),
        flops=5 * values,
    )


def _qk_norm_rope(n: Mapping[str, int], item: int) -> Traffic:
    values = 2 * n["B"] * n["S"] * n["A"] * n["E"]
    one, wide = values * item, values * 4
    table = 2 * n["B"] * n["S"] * n["E"] / 2 * 4
    # Eager: norm; to float32; turn; back. Its backward: the same turn, then dx, then dweight.
    return Traffic(
        fused=Cost(forward=2 * one + table, backward=3 * one + 2 * table, kept=one),
        eager=Cost(forward=4 * one + 4 * wide + 2 * table, backward=7 * one + 4 * wide, kept=one),
        flops=26 * values,
    )


def _gelu_linear2(n: Mapping[str, int], item: int) -> Traffic:
    rows = n["B"] * n["S"]
    near, far = rows * n["D"] * item, rows * n["M"] * item
    weight = n["D"] * (n["D"] + n["M"]) * item
    # Products read both factors and write the result, once each.
    products = (near + far) + weight + near
    backward = (2 * near + far + weight) + (2 * near + far + weight)
    return Traffic(
        fused=Cost(forward=2 * far + products + 2 * near, backward=4 * far + backward, kept=far),
        eager=Cost(
            forward=2 * far + 2 * (near + far) + products,
            backward=3 * far + backward,
            kept=near + 2 * far,
        ),
        flops=6 * rows * n["D"] * (n["D"] + n["M"]),
    )


def _lse_merge(n: Mapping[str, int], item: int) -> Traffic:
    values = n["B"] * n["S"] * n["A"] * n["E"]
    lse = n["B"] * n["S"] * n["A"] * 4
    return Traffic(
        fused=Cost(forward=values * (8 + item) + 3 * lse, backward=0, kept=0),
        eager=Cost(forward=values * (16 + item) + 17 * lse, backward=0, kept=0),
        flops=3 * values,
    )


def _adamw_ema(n: Mapping[str, int], item: int) -> Traffic:
    values = n["N"]
    # Eager: scale the gradients, torch's fused AdamW, move the average.
    return Traffic(
        fused=Cost(forward=values * (32 + item), backward=0, kept=0),
        eager=Cost(forward=values * (2 * item + 24 + item + 12), backward=0, kept=0),
        flops=18 * values,
    )


_FORMULAS: dict[str, Callable[[Mapping[str, int], int], Traffic]] = {
    "norm_modulate": _norm_modulate,
    "gated_residual": _gated_residual,
    "qk_norm_rope": _qk_norm_rope,
    "gelu_linear2": _gelu_linear2,
    "lse_merge": _lse_merge,
    "adamw_ema": _adamw_ema,
}

"""Parameters of the transformer in closed form, and what tensor parallelism leaves on a rank."""

from dataclasses import dataclass

from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.layers import FREQUENCY_DIM


@dataclass(frozen=True, slots=True)
class Count:
    """Numbers of parameters."""

    cut: int
    """Divided over tensor-parallel ranks."""
    whole: int
    """On every one of them."""

    def on(self, tp: int) -> float:
        """Return the parameters of one of ``tp`` ranks."""
        return self.cut / tp + self.whole

    def __add__(self, other: "Count") -> "Count":
        return Count(self.cut + other.cut, self.whole + other.whole)

    def __mul__(self, times: int) -> "Count":
        return Count(self.cut * times, self.whole * times)


@dataclass(frozen=True, slots=True)
class Parameters:
    """Those of one block of each kind and of what is outside every unit of ZeRO."""

    double: Count
    single: Count
    refiner: Count
    root: Count
    total: Count


def parameters(model: HunyuanConfig) -> Parameters:
    """Count the parameters of ``model``, by the cuts of its sharding plan."""
    d, m, e = model.hidden_size, model.mlp_size, model.head_dim
    mlp = _column(d, m) + _row(m, d)
    attention = _column(d, 3 * d) + _row(d, d)
    double = (_column(d, 6 * d) + attention + mlp + Count(0, 2 * e)) * 2
    single = _column(d, 3 * d) + _column(d, 3 * d + m) + _row(d + m, d) + Count(0, 2 * e)
    refiner = _column(d, 2 * d) + attention + mlp + Count(0, 4 * d)
    scalar = _column(FREQUENCY_DIM, d) + _row(d, d)
    patch_in, patch_out = (
        channels * model.patch_volume for channels in (model.in_channels, model.out_channels)
    )
    root = (
        scalar * (3 if model.guidance_embed else 2)  # time_in, guidance_in, the refiner's time
        + _column(model.text_dim, d)
        + (_column(model.text_dim, d) + _row(d, d))
        + (_column(model.pooled_dim, d) + _row(d, d))
        + _column(d, 2 * d)
        + Count(0, (patch_in + 1) * d + (d + 1) * patch_out)
    )
    blocks = double * model.num_double_blocks + single * model.num_single_blocks
    return Parameters(double, single, refiner, root, blocks + refiner * model.refiner_depth + root)


def _column(inner: int, outer: int) -> Count:
    """Count a linear cut by output features, bias included."""
    return Count((inner + 1) * outer, 0)


def _row(inner: int, outer: int) -> Count:
    """Count a linear cut by input features, whose bias is whole."""
    return Count(inner * outer, outer)

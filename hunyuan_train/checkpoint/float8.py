"""The released float8 form of the weights, multiplied out.

In ``mp_rank_00_model_states_fp8.pt`` the weights of the linears inside the blocks are
float8_e4m3fn. ``mp_rank_00_model_states_fp8_map.pt`` beside it has one scale for each of these
linears, by module name: what is computed with is value times scale.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.checkpoint.tensor_source import TensorInfo, TensorSource
from hunyuan_train.models.hunyuan.state_dict import common_prefix

FLOAT8_SUFFIX = "_fp8"
"""End of the stem of the released float8 file; before it, that of the bfloat16 file."""
MAP_SUFFIX = "_map"
"""What the stem of the file of scales has in addition to that of the weights."""


def dequantised(
    source: TensorSource, path: Path, read: Callable[[Path], Any], dtype: torch.dtype
) -> TensorSource:
    """Return ``source`` with its float8_e4m3fn weights times their scales; itself if it has none.

    Args:
        source: Weights as stored.
        path: Their file; the scales lie beside it.
        read: Reads a ``torch.save`` file.
        dtype: Type of the products, which are computed in float32 and rounded once.

    Raises:
        ValueError: the scales are missing, or one of them is, or is no positive number.
    """
    quantised = [k for k, i in source.infos.items() if i.dtype is torch.float8_e4m3fn]
    if not quantised:
        return source
    scales_path = path.with_name(f"{path.stem}{MAP_SUFFIX}.pt")
    if not scales_path.is_file():
        raise ValueError(
            f"{path}: {quantised[0]} is stored as float8 and its scale should be in "
            f"{scales_path.name} beside it, which is missing; copy that file too, or convert the "
            "bfloat16 weights"
        )
    stored = read(scales_path)
    if not isinstance(stored, dict):
        raise ValueError(f"{scales_path} holds a {type(stored).__name__}, not a dict of scales")
    prefix = common_prefix(source.infos)
    scales: dict[str, float] = {}
    for key in quantised:
        module = key.removesuffix(".weight").removeprefix(prefix)
        if module not in stored:
            raise ValueError(
                f"{scales_path} lacks {module}, the scale of the float8 weights {key}; is it the "
                f"map of {path.name}?"
            )
        scales[key] = _scale(stored[module], module, scales_path)
    return _Dequantised(source, scales, dtype)


def _scale(value: Any, module: str, path: Path) -> float:
    """Return a scale as a number; a float32 or bfloat16 tensor is exactly that."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.float().item()
    if not isinstance(value, float | int) or not (math.isfinite(value) and value > 0):
        shown = list(value.shape) if isinstance(value, Tensor) else value
        raise ValueError(f"{path}: {module} is {shown}, expected one positive number")
    return float(value)


class _Dequantised:
    def __init__(self, source: TensorSource, scales: dict[str, float], dtype: torch.dtype) -> None:
        self._source, self._scales, self._dtype = source, scales, dtype
        self.infos = {
            key: TensorInfo(info.shape, dtype if key in scales else info.dtype)
            for key, info in source.infos.items()
        }

    def read(self, key: str) -> Tensor:
        tensor = self._source.read(key)
        if key not in self._scales:
            return tensor
        return tensor.float().mul_(self._scales[key]).to(self._dtype)

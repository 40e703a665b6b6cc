"""Weights on disk whose tensors are read one by one, and what may be laid over them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# safetensors names of the types a released or trained model is stored in.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape and type of a tensor on disk, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the values."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorSource(Protocol):
    """Weights on disk whose tensors are read one by one."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Every tensor's key, shape and type."""
        ...

    def read(self, key: str) -> Tensor:
        """Return one tensor on the CPU."""
        ...


def renamed(source: TensorSource, rename: Callable[[str], str | None]) -> TensorSource:
    """Return ``source`` under other keys; a key renamed to None is left out."""
    return _Renamed(source, rename)


class _Renamed:
    def __init__(self, source: TensorSource, rename: Callable[[str], str | None]) -> None:
        self._source = source
        self._stored = {new: old for old in source.infos if (new := rename(old)) is not None}
        self.infos = {new: source.infos[old] for new, old in self._stored.items()}

    def read(self, key: str) -> Tensor:
        return self._source.read(self._stored[key])


def in_dtype(source: TensorSource, dtype: torch.dtype) -> TensorSource:
    """Return ``source`` with every floating-point tensor in ``dtype``."""
    return _Cast(source, dtype)


class _Cast:
    def __init__(self, source: TensorSource, dtype: torch.dtype) -> None:
        self._source, self._dtype = source, dtype
        self.infos = {
            key: TensorInfo(info.shape, dtype if info.dtype.is_floating_point else info.dtype)
            for key, info in source.infos.items()
        }

    def read(self, key: str) -> Tensor:
        tensor = self._source.read(key)
        found = tensor.to(self.infos[key].dtype)
        # float16 ends at 65504; the other types hold whatever a weight may be.
        if self._dtype is torch.float16 and bool((found.isinf() & tensor.isfinite()).any()):
            raise ValueError(
                f"{key} has the value {tensor.abs().max():g}, which float16 cannot hold; choose "
                "dtype=bfloat16"
            )
        return found

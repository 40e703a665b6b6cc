"""Whether the fused kernel of an op runs for a tensor, or its plain PyTorch reference."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Mode(StrEnum):
    """When fused kernels run where they can."""

    auto = "auto"
    on = "on"
    off = "off"


OPS = ("norm_modulate", "gated_residual", "qk_norm_rope", "gelu_linear2", "lse_merge", "adamw_ema")

_PAYS: dict[str, bool] = dict.fromkeys(OPS, True)
"""Ops that were measured to be faster or to need less memory on a GPU; ``auto`` runs these."""

_LARGEST_LAST_DIM = {
    "norm_modulate": 16_384,
    "gated_residual": 16_384,
    "qk_norm_rope": 512,
    "lse_merge": 512,
}
"""A row that is reduced, or that meets one value, has to fit the registers of one program."""

_mode = Mode.auto
_switches: dict[str, bool] = {}
_devices: set[str] = {"cuda"}


def set_mode(mode: str) -> None:
    """Choose when fused kernels run.

    Args:
        mode: ``auto`` runs the ops that were measured to pay, ``on`` all of them, ``off`` none.

    Raises:
        ValueError: no such mode.
    """
    global _mode
    if mode not in list(Mode):
        raise ValueError(f"mode {mode!r} of fused kernels does not exist; choose auto, on or off")
    _mode = Mode(mode)


def set_enabled(op: str, enabled: bool | None) -> None:
    """Switch one op on or off in modes ``auto`` and ``on``; None leaves it to the mode again.

    Raises:
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"there is no fused op {op!r}; choose from {' '.join(OPS)}")
    if enabled is None:
        _switches.pop(op, None)
    else:
        _switches[op] = enabled


@contextmanager
def also_on(device_type: str) -> Iterator[None]:
    """Take tensors of a further device type for CUDA tensors inside a ``with`` block.

    ``cpu`` is for kernels that were imported in Triton's interpreter, ``meta`` for tracing what a
    GPU would keep.
    """
    added = device_type not in _devices
    _devices.add(device_type)
    try:
        yield
    finally:
        if added:
            _devices.discard(device_type)


def enabled(op: str, tensor: Tensor) -> bool:
    """Return whether the fused kernel of ``op`` runs for its main input ``tensor``."""
    if _mode is Mode.off or not _switches.get(op, _mode is Mode.on or _PAYS[op]):
        return False
    if not HAS_TRITON or tensor.device.type not in _devices or tensor.dtype not in _DTYPES:
        return False
    if tensor.numel() == 0:
        return False
    return tensor.dim() == 0 or tensor.shape[-1] <= _LARGEST_LAST_DIM.get(op, tensor.shape[-1])

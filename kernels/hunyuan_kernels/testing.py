"""Kernels against their references: neither may be further from float64 than eager PyTorch is."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hunyuan_kernels import dispatch
from hunyuan_kernels.traffic import Cost, Traffic, bytes_moved

__all__ = ["Cost", "Deviation", "Traffic", "bytes_moved", "check", "compare", "interpreted"]

RATIO = 1.1
FLOOR = 1e-6
"""Relative error in float32 below which the order of additions decides."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """Root mean square errors against float64 over the root mean square of the values."""

    name: str
    fused: float
    eager: float
    floor: float
    """Below it an error is rounding: ``FLOOR``, or what rounding the exact values would make."""

    @property
    def ok(self) -> bool:
        """Whether the kernel is as good as eager PyTorch, or both only round."""
        return self.fused <= max(RATIO * self.eager, self.floor)


def compare(op: str, *args: Any, seed: int = 0, **kwargs: Any) -> list[Deviation]:
    """Run an op and its reference, and the reference in float64 on the same inputs.

    Compared are the results, every floating tensor among the arguments after the call, and the
    gradients of those that require them, for random gradients of the results with padded rows.

    Args:
        op: its name.
        args: of the op; strides are kept.
        seed: of the gradients.
        kwargs: of the op.

    Returns:
        One deviation per tensor.

    Raises:
        AssertionError: shapes or dtypes of kernel and reference differ.
    """
    home = f"hunyuan_kernels.ops.{op}"
    fused_fn = getattr(import_module(f"{home}.op"), op)
    reference_fn = getattr(import_module(f"{home}.reference"), op)
    device = next(t.device.type for t in pytree.tree_leaves(args) if isinstance(t, Tensor))
    exact = _run(reference_fn, args, kwargs, seed, wide=True)
    eager = _run(reference_fn, args, kwargs, seed, wide=False)
    # Keeps a dispatch that would quietly run the reference from passing.
    with (
        mock.patch.object(
            import_module(f"{home}.reference"), op, side_effect=AssertionError("not dispatched")
        ),
        dispatch.also_on(device),
    ):
        fused = _run(fused_fn, args, kwargs, seed, wide=False)
    assert list(fused) == list(eager) == list(exact)
    return [_deviation(name, fused[name], eager[name], exact[name]) for name in exact]


def check(op: str, *args: Any, seed: int = 0, **kwargs: Any) -> None:
    """Raise ``AssertionError`` where ``compare`` finds the kernel worse than eager PyTorch."""
    worse = [d for d in compare(op, *args, seed=seed, **kwargs) if not d.ok]
    assert not worse, "\n".join(
        f"{op} {d.name}: fused {d.fused:.3g}, eager {d.eager:.3g}, floor {d.floor:.3g}"
        for d in worse
    )


def _run(
    fn: Callable[..., Any], args: Any, kwargs: Any, seed: int, *, wide: bool
) -> dict[str, Tensor]:
    """Return results, arguments after the call, and gradients by name."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: _copy(t, wide), (args, kwargs))
    results = fn(*args, **kwargs)
    found = _named("result", results)
    found |= {f"{name} after": t for name, t in _named("argument", (args, kwargs)).items()}
    wanted = {n: t for n, t in _named("argument", (args, kwargs)).items() if t.requires_grad}
    if wanted:
        generator = torch.Generator().manual_seed(seed)
        outputs = [t for t in pytree.tree_leaves(results) if t.requires_grad]
        grads = [_padded_noise(t, generator) for t in outputs]
        given = torch.autograd.grad(outputs, list(wanted.values()), grads)
        found |= {f"{n} gradient": g for n, g in zip(wanted, given, strict=True)}
    return {name: t.detach() for name, t in found.items()}


def _copy(tensor: Tensor, wide: bool) -> Tensor:
    """Return a leaf with the values and strides of ``tensor``, in float64 if ``wide``."""
    dtype = torch.float64 if wide and tensor.is_floating_point() else tensor.dtype
    with torch.no_grad():
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        storage = torch.full((extent,), math.nan, device=tensor.device).to(dtype)
        copied = storage.as_strided(tensor.shape, tensor.stride()).copy_(tensor)
    return copied.requires_grad_(tensor.requires_grad)


def _padded_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    rows = torch.randn(*like.shape[:-1], like.shape[-1] + 8, generator=generator)
    # Rounded to the narrowest dtype, so that every run gets the same numbers.
    rows = rows.bfloat16().to(like.device, like.dtype)
    return rows[..., : like.shape[-1]]


def _named(prefix: str, tree: Any) -> dict[str, Tensor]:
    return {
        prefix + pytree.keystr(path): leaf
        for path, leaf in pytree.tree_flatten_with_path(tree)[0]
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }


def _deviation(name: str, fused: Tensor, eager: Tensor, exact: Tensor) -> Deviation:
    assert fused.shape == eager.shape, f"{name}: {fused.shape} is not {eager.shape}"
    assert fused.dtype == eager.dtype, f"{name}: {fused.dtype} is not {eager.dtype}"
    floor = FLOOR
    if fused.dtype != torch.float32:
        floor = max(floor, 1.05 * _error(exact.to(fused.dtype), exact))
    return Deviation(name, _error(fused, exact), _error(eager, exact), floor)


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the relative error; infinities have to be where they belong, NaN is never right."""
    found = found.double()
    finite = exact.isfinite()
    if not torch.equal(found[~finite], exact[~finite]) or not bool(found[finite].isfinite().all()):
        return math.inf
    size = exact[finite].norm().item()
    difference = (found[finite] - exact[finite]).norm().item()
    return difference / size if size > 0 else difference


@contextmanager
def interpreted() -> Iterator[None]:
    """Run kernels in Triton's interpreter inside a ``with`` block; for machines without a GPU.

    TRITON_INTERPRET=1 has to be set when the kernels are first imported and inside the block.

    Two things of the interpreter are mended: functions of ``triton.language`` that were imported
    before the variable was set stay compiled ones, which the interpreter cannot call; and it cuts
    float32 off to bfloat16, where a GPU rounds to nearest even.
    """
    from triton.runtime import interpreter

    _interpret_language()
    with mock.patch.object(interpreter, "_convert_float", _rounding_convert(interpreter)):
        yield


def _interpret_language() -> None:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    for name, function in list(vars(tl.standard).items()):
        if isinstance(function, JITFunction):
            mended = InterpretedFunction(function.fn)
            for home in (tl.standard, tl, tl.tensor):
                if getattr(home, name, None) is not None:
                    setattr(home, name, mended)


def _rounding_convert(interpreter: Any) -> Callable[..., Any]:
    import triton.language as tl

    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            bits = np.ascontiguousarray(values).view(np.uint32)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return np.ascontiguousarray(values).astype(np.uint32) << 16
        return original(values, source, target, rounding)

    return convert

"""Flash attention from its packages, where they are installed; imported when first asked for.

| kernel | package | module | compute capability |
|---|---|---|---|
| ``flash2`` | flash-attn >= 2.8 | ``flash_attn.flash_attn_interface`` | 8.0 and more |
| ``flash3`` | flash-attn-3 | ``flash_attn_interface`` | 9.0 |
| ``flash4`` | flash-attn-4 | ``flash_attn.cute.interface`` | 9.0, 10.x, 11.x |

All take bf16 and fp16, return the natural log-sum-exp ([B, A, S], packed [A, T]) and have a
backward that takes output and log-sum-exp. Some releases of flash-attn-4 have no packed backward on
compute capability 9.0; the check before a choice finds that.
"""

import inspect
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.parallel.attention_kernels import (
    Backend,
    VarlenKernel,
    capability,
    flash_needs,
    needs,
    varlen_backend,
)
from hunyuan_train.parallel.key_layout import Ragged

_PACKAGES = {
    "flash2": ("flash-attn", "flash_attn.flash_attn_interface"),
    "flash3": ("flash-attn-3", "flash_attn_interface"),
    "flash4": ("flash-attn-4", "flash_attn.cute.interface"),
}


@cache
def _load(name: str) -> Any:
    """Return the module of a kernel, or the sentence that says why there is none."""
    package, module = _PACKAGES[name]
    try:
        return import_module(module)
    except Exception as error:  # a package built for another torch or driver fails in many ways
        if isinstance(error, ModuleNotFoundError) and module.startswith(error.name or "?"):
            return f"the package {package} is not installed"
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"the package {package} cannot be imported ({first})"


def _missing(name: str) -> str | None:
    found = _load(name)
    return found if isinstance(found, str) else None


def _flash2_refuses(q: Tensor, k: Tensor, masked: bool) -> str | None:
    return _missing("flash2") or flash_needs(q, k, masked)


def _flash3_refuses(q: Tensor, k: Tensor, masked: bool) -> str | None:
    del k, masked
    reason = _missing("flash3") or needs(q, least=(9, 0), head_dim=256)
    if reason is None and capability(q.device)[0] != 9:
        major, minor = capability(q.device)
        return f"it needs compute capability 9.0, not {major}.{minor}"
    return reason


def _flash4_refuses(q: Tensor, k: Tensor, masked: bool) -> str | None:
    del k, masked
    reason = _missing("flash4") or needs(q, least=(9, 0), head_dim=128)
    if reason is None and capability(q.device)[0] not in (9, 10, 11):
        major, minor = capability(q.device)
        return f"it needs compute capability 9.0, 10.x or 11.x, not {major}.{minor}"
    return reason


def _bounds(ragged: Ragged | None) -> dict[str, Any]:
    """Return the arguments that make a kernel take packed rows."""
    if ragged is None:
        return {}
    return {
        "cu_seqlens_q": ragged.q_offsets,
        "cu_seqlens_k": ragged.k_offsets,
        "max_seqlen_q": ragged.q_longest,
        "max_seqlen_k": ragged.k_longest,
    }


def _flash2_options(q: Tensor) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _flash2_forward(
    q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None
) -> tuple[Tensor, Tensor]:
    module = _load("flash2")
    varlen = ragged is not None
    run = (
        module._wrapped_flash_attn_varlen_forward if varlen else module._wrapped_flash_attn_forward
    )
    found = run(q, k, v, **_bounds(ragged), **_flash2_options(q), return_softmax=False)
    return found[0], found[1]


def _flash2_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ragged: Ragged | None,
) -> tuple[Tensor, Tensor, Tensor]:
    module = _load("flash2")
    varlen = ragged is not None
    run = (
        module._wrapped_flash_attn_varlen_backward
        if varlen
        else module._wrapped_flash_attn_backward
    )
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    deterministic = torch.are_deterministic_algorithms_enabled()
    run(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        *grads,
        **_bounds(ragged),
        **_flash2_options(q),
        deterministic=deterministic,
    )
    return grads


def _flash3_forward(
    q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None
) -> tuple[Tensor, Tensor]:
    _load("flash3")  # registers the ops
    # One split: more would be merged from partial results, which pays for few queries only.
    options = {"softmax_scale": q.shape[-1] ** -0.5, "is_causal": False, "num_splits": 1}
    found = torch.ops.flash_attn_3.fwd(q, k, v, **_bounds(ragged), **options)
    return found[0], found[1]


def _flash3_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ragged: Ragged | None,
) -> tuple[Tensor, Tensor, Tensor]:
    _load("flash3")
    grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    torch.ops.flash_attn_3.bwd(
        grad_out,
        q,
        k,
        v,
        out,
        lse,
        *grads,
        **_bounds(ragged),
        softmax_scale=q.shape[-1] ** -0.5,
        is_causal=False,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return grads


@cache
def _flash4_bounds_unused(function: str) -> frozenset[str]:
    """Return which lengths a function does not ask for; releases differ."""
    taken = inspect.signature(getattr(_load("flash4"), function)).parameters
    return frozenset({"max_seqlen_q", "max_seqlen_k"}.difference(taken))


def _flash4_call(function: str, *tensors: Tensor, **options: Any) -> Any:
    for name in _flash4_bounds_unused(function):
        options.pop(name, None)
    return getattr(_load("flash4"), function)(*tensors, **options)


def _flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None
) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5
    options = {"softmax_scale": scale, "causal": False, "return_lse": True, **_bounds(ragged)}
    found = _flash4_call("_flash_attn_fwd", q, k, v, **options)
    return found[0], found[1]


def _flash4_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ragged: Ragged | None,
) -> tuple[Tensor, Tensor, Tensor]:
    options = {
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": False,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **_bounds(ragged),
    }
    found = _flash4_call("_flash_attn_bwd", q, k, v, out, grad_out, lse, **options)
    return found[0], found[1], found[2]


FLASH2: Backend = varlen_backend(
    "flash2", _flash2_refuses, VarlenKernel(_flash2_forward, _flash2_backward)
)
FLASH3: Backend = varlen_backend(
    "flash3", _flash3_refuses, VarlenKernel(_flash3_forward, _flash3_backward)
)
FLASH4: Backend = varlen_backend(
    "flash4", _flash4_refuses, VarlenKernel(_flash4_forward, _flash4_backward)
)

"""Attention on one device that also returns the log-sum-exp, and its backward from a merged result.

Ring attention calls ``attend`` once per hop, merges the pieces, and calls ``attend_backward`` with
the *merged* output and log-sum-exp: with those, the probabilities a kernel recomputes are the
global ones, so the gradients of the hops simply add up.

Which kernel runs is fixed once per process (``attention_choice.use_attention``). Where nothing is
fixed, and for inputs that the fixed kernel does not take:

| device | dtype | mask | backend |
|---|---|---|---|
| CPU | any | any | ``cpu``: torch's flash attention for CPU |
| CUDA, compute capability >= 8.0 | bf16, fp16 | none | ``flash`` |
| CUDA | bf16, fp16, float32 | any | ``efficient`` |
| anything else | any | any | ``reference`` |
"""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from hunyuan_train.parallel.attention_kernels import (
    CPU,
    CUDNN,
    EFFICIENT,
    FLASH,
    REFERENCE,
    Backend,
)
from hunyuan_train.parallel.flash_attn import FLASH2, FLASH3, FLASH4
from hunyuan_train.parallel.key_layout import KeyLayout, key_layout

log = logging.getLogger(__name__)

BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (FLASH4, FLASH3, FLASH2, CUDNN, FLASH, EFFICIENT, CPU, REFERENCE)
}
"""All kernels by the name that ``memory.attention`` has for them."""

_fixed: dict[bool, str] = {}
_warned: set[tuple[str, str]] = set()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys, scale 1/sqrt(E).

    Args:
        q: queries [B, Sq, A, E].
        k: keys [B, Sk, A, E]; Sk may be 0.
        v: values, same shape as ``k``.
        mask: bool [B, Sk], True for keys that exist; None when all do. What kernels need to know of
            it is computed once per object, so pass the same one in every block.

    Returns:
        The output [B, Sq, A, E] in the dtype of ``q``, and the natural log-sum-exp [B, A, Sq] in
        float32 (float64 for float64 inputs). A sample without any key has output 0 and
        log-sum-exp -inf.
    """
    return attend_with(choose_backend(q, k, mask is not None), q, k, v, mask)


def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the part of an attention that these keys contributed.

    Args:
        grad_out: gradient of the whole attention's output [B, Sq, A, E].
        q: queries [B, Sq, A, E].
        k: the keys of this part [B, Sk, A, E].
        v: their values.
        mask: as in ``attend``.
        out: output over *all* keys [B, Sq, A, E], dtype of ``q``.
        lse: log-sum-exp over all keys [B, A, Sq].

    Returns:
        This part's share of dq, and dk and dv of its keys, in the dtype of ``q``. They are zero
        for a sample without any key here.
    """
    backend = choose_backend(q, k, mask is not None)
    return attend_backward_with(backend, grad_out, q, k, v, mask, out, lse)


def attend_with(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Do what ``attend`` does with a kernel that takes these inputs."""
    if k.shape[1] == 0:  # the CPU kernel divides by the number of keys and ends the process
        return torch.zeros_like(q), _lse_like(q, -torch.inf)
    layout = key_layout(mask)
    out, lse = backend.forward(_dense_heads(q), _dense_heads(k), _dense_heads(v), layout)
    if layout is None or layout.absent is None:
        return out, lse
    out.masked_fill_(layout.absent[:, None, None, None], 0)
    return out, lse.masked_fill_(layout.absent[:, None, None], -torch.inf)


def attend_backward_with(
    backend: Backend,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Do what ``attend_backward`` does with a kernel that takes these inputs."""
    if k.shape[1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    layout: KeyLayout | None = key_layout(mask)
    grad, queries, keys, values, merged = map(_dense_heads, (grad_out, q, k, v, out))
    dq, dk, dv = backend.backward(grad, queries, keys, values, layout, merged, lse)
    if layout is None or layout.absent is None:
        return dq, dk, dv
    nothing = layout.absent[:, None, None, None]
    return dq.masked_fill_(nothing, 0), dk.masked_fill_(nothing, 0), dv.masked_fill_(nothing, 0)


def choose_backend(q: Tensor, k: Tensor, masked: bool) -> Backend:
    """Return the fixed kernel if it takes these [B, S, A, E], else that of the module's table."""
    name = _fixed.get(masked)
    if name is None:
        return default_backend(q, k, masked)
    reason = BACKENDS[name].refuses(q, k, masked)
    if reason is None:
        return BACKENDS[name]
    other = default_backend(q, k, masked)
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        log.warning("attention kernel %s is replaced by %s: %s", name, other.name, reason)
    return other


def default_backend(q: Tensor, k: Tensor, masked: bool) -> Backend:
    """Return the kernel of the module's table."""
    choices = (CPU, EFFICIENT) if masked else (CPU, FLASH, EFFICIENT)
    return next((one for one in choices if one.takes(q, k, masked)), REFERENCE)


def fix_backends(names: Mapping[bool, str]) -> dict[bool, str]:
    """Fix the kernels of this process, for inputs with a mask (True) and without (False).

    Returns:
        What was fixed before, to be put back.
    """
    assert all(name in BACKENDS for name in names.values()), f"no such kernels: {names}"
    before = dict(_fixed)
    _fixed.clear()
    _fixed.update(names)
    _warned.clear()
    return before


def _dense_heads(rows: Tensor) -> Tensor:
    """Return [B, S, A, E] with the values of a head side by side, as kernels need them."""
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _lse_like(q: Tensor, value: float) -> Tensor:
    """Return a log-sum-exp [B, A, Sq] filled with ``value``."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_full((q.shape[0], q.shape[2], q.shape[1]), value, dtype=dtype)

"""Attention on one device that also returns the log-sum-exp, and its backward from a merged result.

This is the only place that knows kernels. Ring attention calls ``attend`` once per hop, merges the
pieces, and calls ``attend_backward`` with the *merged* output and log-sum-exp: with those, the
probabilities a kernel recomputes are the global ones, so the gradients of the hops simply add up.

| device | dtype | mask | backend |
|---|---|---|---|
| CPU | any | any | ``cpu``: torch's flash attention for CPU |
| CUDA, compute capability >= 8.0 | bf16, fp16 | none | ``flash`` |
| CUDA | bf16, fp16, float32 | any | ``efficient`` |
| anything else | any | any | ``reference`` |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

aten = torch.ops.aten

# The scores the reference keeps at a time: 2**24 float32 values are 64 MiB.
REFERENCE_SCORES = 2**24
# Efficient attention reads bias rows in vectors of 16 and pads the log-sum-exp to 32 queries.
_BIAS_ALIGNMENT = 16
_LSE_ALIGNMENT = 32

_Pair: TypeAlias = tuple[Tensor, Tensor]
_Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Backend:
    """Two kernels over [B, A, S, E] views, with an additive key bias [B, 1, 1, Sk] or None."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor, Tensor | None], _Pair]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor],
        _Triple,
    ]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax attention over all keys, scale 1/sqrt(E).

    Args:
        q: queries [B, Sq, A, E].
        k: keys [B, Sk, A, E]; Sk may be 0.
        v: values, same shape as ``k``.
        mask: bool [B, Sk], True for keys that exist; None when all do.

    Returns:
        The output [B, Sq, A, E] in the dtype of ``q``, and the natural log-sum-exp [B, A, Sq] in
        float32 (float64 for float64 inputs). A sample without any key has output 0 and
        log-sum-exp -inf.
    """
    if k.shape[1] == 0:  # the CPU kernel divides by the number of keys and ends the process
        return torch.zeros_like(q), _lse_like(q, -torch.inf)
    bias, absent = _key_bias(mask, q.dtype)
    backend = choose_backend(q, bias is not None)
    out, lse = backend.forward(_heads_first(q), _heads_first(k), _heads_first(v), bias)
    out = out.transpose(1, 2)
    if absent is not None:
        out = out.masked_fill(absent[:, None, None, None], 0)
        lse = lse.masked_fill(absent[:, None, None], -torch.inf)
    return out, lse


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
    if k.shape[1] == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    bias, absent = _key_bias(mask, q.dtype)
    backend = choose_backend(q, bias is not None)
    grad, queries, keys, values, merged = map(_heads_first, (grad_out, q, k, v, out))
    grads = backend.backward(grad, queries, keys, values, bias, merged, lse)
    dq, dk, dv = (grad.transpose(1, 2) for grad in grads)
    if absent is None:
        return dq, dk, dv
    nothing = absent[:, None, None, None]
    return dq.masked_fill(nothing, 0), dk.masked_fill(nothing, 0), dv.masked_fill(nothing, 0)


def choose_backend(q: Tensor, masked: bool) -> Backend:
    """Return the fastest backend that takes these queries; see the table of the module."""
    if q.device.type == "cpu":
        return CPU
    half = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cuda" and q.shape[-1] % 8 == 0:
        ampere = half and torch.cuda.get_device_capability(q.device) >= (8, 0)
        if ampere and not masked and q.shape[-1] <= 256:
            return FLASH
        if half or q.dtype == torch.float32:
            return EFFICIENT
    return REFERENCE


def _heads_first(rows: Tensor) -> Tensor:
    """View [B, S, A, E] as [B, A, S, E]; kernels need the values of a head side by side."""
    return (rows if rows.stride(-1) == 1 else rows.contiguous()).transpose(1, 2)


def _lse_like(q: Tensor, value: float) -> Tensor:
    """Return a log-sum-exp [B, A, Sq] filled with ``value``."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_full((q.shape[0], q.shape[2], q.shape[1]), value, dtype=dtype)


def _key_bias(mask: Tensor | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the additive bias [B, 1, 1, Sk] of a key mask and which samples have no key, bool [B].

    Kernels differ in what they make of a row whose keys are all masked (the CPU one returns a
    log-sum-exp of 0), so such a sample sees every key here and its results are overwritten after.
    """
    if mask is None:
        return None, None
    batch, keys = mask.shape
    absent = ~mask.any(dim=1)
    padded = -(-keys // _BIAS_ALIGNMENT) * _BIAS_ALIGNMENT
    rows = torch.full((batch, 1, 1, padded), -torch.inf, dtype=dtype, device=mask.device)
    bias = rows[..., :keys]
    bias.masked_fill_((mask | absent[:, None])[:, None, None, :], 0)
    return bias, absent


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> _Pair:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias)


def _cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> _Triple:
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, False, attn_mask=bias
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> _Pair:
    assert bias is None, "flash attention takes no bias"
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> _Triple:
    assert bias is None, "flash attention takes no bias"
    # Only dropout reads the generator's state; these have the shapes that the forward returns.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    return aten._scaled_dot_product_flash_attention_backward(
        grad_out,
        q,
        k,
        v,
        out,
        lse.contiguous(),  # read by pointer, never by stride
        None,
        None,
        q.shape[2],
        k.shape[2],
        0.0,
        False,
        state,
        unused,
    )


def _expand_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Show efficient attention a [B, A, Sq, Sk] bias of stride 0 over heads and queries."""
    if bias is None:
        return None
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> _Pair:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        q, k, v, _expand_bias(bias, q, k), True
    )
    return out, lse[..., : q.shape[2]]


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> _Triple:
    padding = -q.shape[2] % _LSE_ALIGNMENT
    # +inf is what the forward writes there: the probability of a query that is not one is 0.
    aligned = torch.nn.functional.pad(lse, (0, padding), value=torch.inf).contiguous()
    # The output is read as [B, S, A, E] without gaps whatever its strides say.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    unused = torch.zeros((), dtype=torch.int64)  # state of the generator, read by dropout only
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad_out,
        q,
        k,
        v,
        _expand_bias(bias, q, k),
        out,
        aligned,
        unused,
        unused,
        0.0,
        [True, True, True, False],
    )
    return dq, dk, dv


def _query_rows(q: Tensor, k: Tensor) -> int:
    """Return how many queries the reference takes at a time."""
    return max(1, REFERENCE_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> _Pair:
    dtype = torch.promote_types(q.dtype, torch.float32)
    keys, values = k.to(dtype), v.to(dtype)
    outs, sums = [], []
    for rows in q.split(_query_rows(q, k), dim=2):
        scores = (rows.to(dtype) * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        scores = scores if bias is None else scores + bias.to(dtype)
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse[..., None]).exp() @ values).to(q.dtype))
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def _reference_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, out: Tensor, lse: Tensor
) -> _Triple:
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale, count = q.shape[-1] ** -0.5, _query_rows(q, k)
    keys, values = k.to(dtype), v.to(dtype)
    dk, dv, dqs = torch.zeros_like(keys), torch.zeros_like(values), []
    chunks = (t.split(count, dim=2) for t in (q, grad_out, out, lse))
    for q_rows, g_rows, o_rows, sums in zip(*chunks, strict=True):
        queries, grads = q_rows.to(dtype), g_rows.to(dtype)
        scores = (queries * scale) @ keys.transpose(-1, -2)
        scores = scores if bias is None else scores + bias.to(dtype)
        weights = (scores - sums[..., None]).exp()  # of the merged softmax
        dv += weights.transpose(-1, -2) @ grads
        inner = grads @ values.transpose(-1, -2) - (grads * o_rows).sum(-1, keepdim=True)
        inner = weights * inner * scale
        dk += inner.transpose(-1, -2) @ queries
        dqs.append((inner @ keys).to(q.dtype))
    return torch.cat(dqs, dim=2), dk.to(k.dtype), dv.to(v.dtype)


CPU = Backend("cpu", _cpu_forward, _cpu_backward)
FLASH = Backend("flash", _flash_forward, _flash_backward)
EFFICIENT = Backend("efficient", _efficient_forward, _efficient_backward)
REFERENCE = Backend("reference", _reference_forward, _reference_backward)

"""The attention kernels that torch brings, behind one interface.

| kernel | device | dtype | head size | keys that do not exist |
|---|---|---|---|---|
| ``cpu`` | CPU | any float | any | bias |
| ``flash`` | CUDA, compute capability >= 8.0 | bf16, fp16 | 8, 16, .. 256 | packed away |
| ``cudnn`` | CUDA, compute capability >= 8.0 | bf16, fp16 | 8, 16, .. 128 | bias |
| ``efficient`` | CUDA | bf16, fp16, float32 | multiples of 8 | bias |
| ``reference`` | any | any float | any | bias |

Every backward computes its probabilities from the log-sum-exp and the output it is given, so these
may be those over further keys; ``attend_backward`` relies on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import torch
from torch import Tensor

from hunyuan_train.parallel.key_layout import KeyLayout, Ragged

aten = torch.ops.aten

# The scores the reference keeps at a time: 2**24 float32 values are 64 MiB.
REFERENCE_SCORES = 2**24
HALF = (torch.bfloat16, torch.float16)
# Efficient attention pads the log-sum-exp to 32 queries.
_LSE_ALIGNMENT = 32

_Pair: TypeAlias = tuple[Tensor, Tensor]
_Triple: TypeAlias = tuple[Tensor, Tensor, Tensor]
Refuses: TypeAlias = Callable[[Tensor, Tensor, bool], str | None]


@dataclass(frozen=True, slots=True)
class Backend:
    """A kernel over [B, S, A, E] whose last dim is contiguous; a key layout of None has all keys.

    Forward returns the output like ``q`` and the natural log-sum-exp [B, A, Sq] in float32 (float64
    for float64 inputs). Backward takes (grad_out, q, k, v, layout, out, lse).
    """

    name: str
    refuses: Refuses
    """Why the kernel cannot take these queries and keys, masked or not; None if it can."""
    forward: Callable[[Tensor, Tensor, Tensor, KeyLayout | None], _Pair]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, KeyLayout | None, Tensor, Tensor],
        _Triple,
    ]

    def takes(self, q: Tensor, k: Tensor, masked: bool) -> bool:
        """Return whether the kernel can attend from ``q`` to ``k``, some of them masked or not."""
        return self.refuses(q, k, masked) is None


@dataclass(frozen=True, slots=True)
class VarlenKernel:
    """A kernel that takes [B, S, A, E], or packed rows [T, A, E] with their boundaries.

    Forward takes (q, k, v, boundaries or None) and returns the output and a log-sum-exp [B, A, Sq],
    packed [A, Tq]; backward takes (grad_out, q, k, v, out, lse, boundaries or None).
    """

    forward: Callable[[Tensor, Tensor, Tensor, Ragged | None], _Pair]
    backward: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Ragged | None],
        _Triple,
    ]


def varlen_backend(name: str, refuses: Refuses, kernel: VarlenKernel) -> Backend:
    """Return the backend that packs away keys that do not exist; all queries are computed."""

    def forward(q: Tensor, k: Tensor, v: Tensor, layout: KeyLayout | None) -> _Pair:
        if layout is None:
            return kernel.forward(q, k, v, None)
        batch, queries = q.shape[:2]
        packed = q.flatten(0, 1), layout.pack(k), layout.pack(v)
        out, lse = kernel.forward(*packed, layout.ragged(queries))
        return out.unflatten(0, (batch, queries)), lse.unflatten(1, (batch, queries)).movedim(0, 1)

    def backward(
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: KeyLayout | None,
        out: Tensor,
        lse: Tensor,
    ) -> _Triple:
        if layout is None:
            return kernel.backward(grad_out, q, k, v, out, lse.contiguous(), None)
        batch, queries = q.shape[:2]
        dq, dk, dv = kernel.backward(
            grad_out.flatten(0, 1),
            q.flatten(0, 1),
            layout.pack(k),
            layout.pack(v),
            out.flatten(0, 1),
            lse.movedim(1, 0).flatten(1).contiguous(),
            layout.ragged(queries),
        )
        return dq.unflatten(0, (batch, queries)), layout.unpack(dk), layout.unpack(dv)

    return Backend(name, refuses, forward, backward)


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of an NVIDIA GPU."""
    return torch.cuda.get_device_capability(device)


def needs(
    q: Tensor,
    *,
    least: tuple[int, int] = (0, 0),
    dtypes: tuple[torch.dtype, ...] = HALF,
    head_dim: int,
) -> str | None:
    """Return why a CUDA kernel cannot take ``q``, None if it can.

    Args:
        q: queries [B, S, A, E].
        least: compute capability it was written for.
        dtypes: those it has.
        head_dim: the largest it has.
    """
    if q.device.type != "cuda":
        return f"it needs a CUDA device, not {q.device.type}"
    found = capability(q.device)
    if found < least:
        return (
            f"it needs compute capability {least[0]}.{least[1]} or more, not {found[0]}.{found[1]}"
        )
    if q.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"it takes {names}, not {str(q.dtype).removeprefix('torch.')}"
    if q.shape[-1] % 8 or q.shape[-1] > head_dim:
        return f"it takes head sizes 8, 16, .. {head_dim}, not {q.shape[-1]}"
    return None


def flash_needs(q: Tensor, k: Tensor, masked: bool) -> str | None:
    """Return why flash attention 2, from torch or its package, cannot take these."""
    del k, masked
    # On the smaller chips of a generation its backward has no shared memory for larger heads.
    small = q.device.type == "cuda" and capability(q.device) in ((8, 6), (8, 9), (12, 0), (12, 1))
    return needs(q, least=(8, 0), head_dim=192 if small else 256)


def _cpu_refuses(q: Tensor, k: Tensor, masked: bool) -> str | None:
    del k, masked
    return None if q.device.type == "cpu" else f"it needs a CPU, not {q.device.type}"


def _cudnn_refuses(q: Tensor, k: Tensor, masked: bool) -> str | None:
    del masked
    if q.shape[1] < 2 or k.shape[1] < 2:
        return "it takes two or more queries and keys"
    return needs(q, least=(8, 0), head_dim=128)


def _efficient_refuses(q: Tensor, k: Tensor, masked: bool) -> str | None:
    del k, masked
    return needs(q, dtypes=(*HALF, torch.float32), head_dim=65536)


def _heads_first(*rows: Tensor) -> tuple[Tensor, ...]:
    """View [B, S, A, E] as [B, A, S, E], or back."""
    return tuple(r.transpose(1, 2) for r in rows)


def _bias(layout: KeyLayout | None, q: Tensor) -> Tensor | None:
    return None if layout is None else layout.bias(q.dtype)


def _expanded_bias(layout: KeyLayout | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Show CUDA kernels a [B, A, Sq, Sk] bias of stride 0 over heads and queries."""
    if layout is None:
        return None
    return layout.bias(q.dtype).expand(q.shape[0], q.shape[2], q.shape[1], k.shape[1])


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, layout: KeyLayout | None) -> _Pair:
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
        *_heads_first(q, k, v), attn_mask=_bias(layout, q)
    )
    return out.transpose(1, 2), lse


def _cpu_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: KeyLayout | None,
    out: Tensor,
    lse: Tensor,
) -> _Triple:
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(grad_out, q, k, v, out), lse, 0.0, False, attn_mask=_bias(layout, q)
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> _Pair:
    if ragged is None:
        out, lse = aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v))[:2]
        return out.transpose(1, 2), lse
    bounds = (ragged.q_offsets, ragged.k_offsets, ragged.q_longest, ragged.k_longest)
    return aten._flash_attention_forward(q, k, v, *bounds, 0.0, False, False)[:2]


def _flash_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ragged: Ragged | None,
) -> _Triple:
    # Only dropout reads the generator's state; these have the shapes that the forward returns.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    unused = torch.zeros((), dtype=torch.uint64, device=q.device)
    if ragged is not None:
        bounds = (ragged.q_offsets, ragged.k_offsets, ragged.q_longest, ragged.k_longest)
        return aten._flash_attention_backward(
            grad_out, q, k, v, out, lse, *bounds, 0.0, False, state, unused
        )
    bounds = (None, None, q.shape[1], k.shape[1])
    rows = _heads_first(grad_out, q, k, v, out)
    grads = aten._scaled_dot_product_flash_attention_backward(
        *rows, lse, *bounds, 0.0, False, state, unused
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


@cache
def _cudnn_lse_dims(device: torch.device) -> int:
    """Return whether cuDNN's log-sum-exp is [B, A, S] or [B, A, S, 1]; torch has had both."""
    rows = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    return aten._scaled_dot_product_cudnn_attention(rows, rows, rows, None, True)[1].dim()


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, layout: KeyLayout | None) -> _Pair:
    bias = _expanded_bias(layout, q, k)
    found = aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), bias, True)
    return found[0].transpose(1, 2), found[1].reshape(q.shape[0], q.shape[2], q.shape[1])


def _cudnn_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: KeyLayout | None,
    out: Tensor,
    lse: Tensor,
) -> _Triple:
    # torch keeps one compiled graph per strides of q, k and v, whatever those of the others are.
    rows = _heads_first(grad_out.contiguous(), q, k, v, out.contiguous())
    lse = lse.contiguous()
    state = torch.zeros((), dtype=torch.int64, device=q.device)  # read by dropout only
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *rows,
        lse if _cudnn_lse_dims(q.device) == 3 else lse[..., None],
        state,
        state,
        _expanded_bias(layout, q, k),
        None,
        None,
        q.shape[1],
        k.shape[1],
        0.0,
        False,
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, layout: KeyLayout | None) -> _Pair:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        *_heads_first(q, k, v), _expanded_bias(layout, q, k), True
    )
    return out.transpose(1, 2), lse[..., : q.shape[1]]


def _efficient_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: KeyLayout | None,
    out: Tensor,
    lse: Tensor,
) -> _Triple:
    padding = -q.shape[1] % _LSE_ALIGNMENT
    # +inf is what the forward writes there: the probability of a query that is not one is 0.
    aligned = torch.nn.functional.pad(lse, (0, padding), value=torch.inf).contiguous()
    # The output is read as [B, S, A, E] without gaps whatever its strides say.
    rows = _heads_first(grad_out, q, k, v)
    merged = out.contiguous().transpose(1, 2)
    unused = torch.zeros((), dtype=torch.int64)  # state of the generator, read by dropout only
    *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
        *rows,
        _expanded_bias(layout, q, k),
        merged,
        aligned,
        unused,
        unused,
        0.0,
        [True, True, True, False],
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


def _query_rows(q: Tensor, k: Tensor) -> int:
    """Return how many queries [B, A, S, E] the reference takes at a time."""
    return max(1, REFERENCE_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))


def _reference_forward(q: Tensor, k: Tensor, v: Tensor, layout: KeyLayout | None) -> _Pair:
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = _bias(layout, q)
    q, k, v = _heads_first(q, k, v)
    keys, values = k.to(dtype), v.to(dtype)
    outs, sums = [], []
    for rows in q.split(_query_rows(q, k), dim=2):
        scores = (rows.to(dtype) * q.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
        scores = scores if bias is None else scores + bias.to(dtype)
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse[..., None]).exp() @ values).to(q.dtype))
        sums.append(lse)
    return torch.cat(outs, dim=2).transpose(1, 2), torch.cat(sums, dim=2)


def _reference_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: KeyLayout | None,
    out: Tensor,
    lse: Tensor,
) -> _Triple:
    dtype = torch.promote_types(q.dtype, torch.float32)
    bias = _bias(layout, q)
    grad_out, q, k, v, out = _heads_first(grad_out, q, k, v, out)
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
    dq = torch.cat(dqs, dim=2).transpose(1, 2)
    return dq, dk.to(k.dtype).transpose(1, 2), dv.to(v.dtype).transpose(1, 2)


CPU = Backend("cpu", _cpu_refuses, _cpu_forward, _cpu_backward)
FLASH = varlen_backend("flash", flash_needs, VarlenKernel(_flash_forward, _flash_backward))
CUDNN = Backend("cudnn", _cudnn_refuses, _cudnn_forward, _cudnn_backward)
EFFICIENT = Backend("efficient", _efficient_refuses, _efficient_forward, _efficient_backward)
REFERENCE = Backend("reference", lambda q, k, masked: None, _reference_forward, _reference_backward)

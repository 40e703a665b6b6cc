"""A packed attention kernel for CPUs with the habits of those for GPUs."""

from itertools import pairwise

import torch
from torch import Tensor

from hunyuan_train.parallel.attention_kernels import CPU
from hunyuan_train.parallel.key_layout import Ragged


def pieces(ragged: Ragged) -> list[tuple[slice, slice]]:
    """Return the rows of every sequence's queries and keys."""
    ends = zip(ragged.q_offsets.tolist(), ragged.k_offsets.tolist(), strict=True)
    return [(slice(a[0], b[0]), slice(a[1], b[1])) for a, b in pairwise(ends)]


def varlen_forward(q: Tensor, k: Tensor, v: Tensor, ragged: Ragged | None) -> tuple[Tensor, Tensor]:
    """Leave what lies behind the last sequence as it happens to be."""
    if ragged is None:
        return CPU.forward(q, k, v, None)
    assert q.is_contiguous()
    out = torch.full_like(q, torch.nan)
    lse = torch.full(
        (q.shape[1], q.shape[0]), torch.nan, dtype=torch.promote_types(q.dtype, torch.float32)
    )
    for rows, keys in pieces(ragged):
        assert rows.stop - rows.start <= ragged.q_longest
        assert 0 < keys.stop - keys.start <= ragged.k_longest
        part, sums = CPU.forward(q[None, rows], k[None, keys], v[None, keys], None)
        out[rows], lse[:, rows] = part[0], sums[0]
    return out, lse


def varlen_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    ragged: Ragged | None,
) -> tuple[Tensor, Tensor, Tensor]:
    assert lse.is_contiguous()  # read by pointer on a GPU
    if ragged is None:
        return CPU.backward(grad_out, q, k, v, None, out, lse)
    dq, dk, dv = (torch.full_like(t, torch.nan) for t in (q, k, v))
    for rows, keys in pieces(ragged):
        parts = CPU.backward(
            grad_out[None, rows],
            q[None, rows],
            k[None, keys],
            v[None, keys],
            None,
            out[None, rows],
            lse[None, :, rows],
        )
        dq[rows], dk[keys], dv[keys] = (part[0] for part in parts)
    return dq, dk, dv

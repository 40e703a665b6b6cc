"""Triton kernels of RMSNorm and rotary positions: tiles of [rows, E], a row being one head."""

import triton
import triton.language as tl


@triton.jit
def turn(x, cos, sin, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Rotate adjacent columns (a, b) of [ROWS, 2 * PAIRS] to (a cos - b sin, b cos + a sin)."""
    a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    return tl.reshape(tl.join(a * cos - b * sin, b * cos + a * sin), (ROWS, 2 * PAIRS))


@triton.jit
def norm_turn(ptr, weight, cos, sin, mask, width, eps, ROWS: tl.constexpr, PAIRS: tl.constexpr):
    """Load a tile, normalise and rotate it, in float32."""
    x = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)
    return turn(x * rstd[:, None] * weight, cos, sin, ROWS, PAIRS)


@triton.jit
def turn_norm_backward(
    ptr, grad_ptr, weight, cos, sin, mask, width, eps, ROWS: tl.constexpr, PAIRS: tl.constexpr
):
    """Return dx and grad * n, the terms of dweight, of a tile.

    With n = x * rstd and g the gradient turned back: dx = rstd * (g w - n * mean(g w n)).
    """
    x = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr, mask=mask, other=0.0).to(tl.float32)
    grad = turn(grad, cos, -sin, ROWS, PAIRS)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / width + eps)[:, None]
    normed = x * rstd
    terms = grad * normed
    mean = tl.sum(terms * weight, axis=1)[:, None] / width
    return (grad * weight - normed * mean) * rstd, terms


@triton.jit(do_not_specialize=["rows"])
def qk_norm_rope_fwd_kernel(
    q_ptr, k_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    rows, width, eps,
    q_sample, q_row, q_head, k_sample, k_row, k_head, table_row,
    HEADS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """ROWS of the S * A rows [E] of one sample, q and k."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head, token = row % HEADS, (row // HEADS).to(tl.int64)
    pairs, cols = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    mask = (row < rows)[:, None] & (cols < width)[None, :]
    table = token[:, None] * table_row + pairs[None, :]
    in_table = (row < rows)[:, None] & (pairs < width // 2)[None, :]
    cos = tl.load(cos_ptr + table, mask=in_table, other=0.0)
    sin = tl.load(sin_ptr + table, mask=in_table, other=0.0)
    out = (sample * rows + row)[:, None] * width + cols[None, :]
    weight = tl.load(q_weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    place = (sample * q_sample + token * q_row + head * q_head)[:, None] + cols[None, :]
    q = norm_turn(q_ptr + place, weight, cos, sin, mask, width, eps, ROWS, PAIRS)
    tl.store(q_out_ptr + out, q.to(q_out_ptr.dtype.element_ty), mask=mask)
    weight = tl.load(k_weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    place = (sample * k_sample + token * k_row + head * k_head)[:, None] + cols[None, :]
    k = norm_turn(k_ptr + place, weight, cos, sin, mask, width, eps, ROWS, PAIRS)
    tl.store(k_out_ptr + out, k.to(k_out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "tiles_each"])
def qk_norm_rope_bwd_kernel(
    x_ptr, grad_ptr, weight_ptr, cos_ptr, sin_ptr, dx_ptr, dweight_ptr,
    rows, width, eps, tiles_each,
    x_sample, x_row, x_head, grad_sample, grad_row, grad_head, table_row,
    HEADS: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Tiles of one program for q or k: dx, and their share of dweight [B, programs, E]."""
    part, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pairs, cols = tl.arange(0, PAIRS), tl.arange(0, 2 * PAIRS)
    weight = tl.load(weight_ptr + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
    dweight = tl.full((ROWS, 2 * PAIRS), 0.0, tl.float32)
    for tile in range(tiles_each):
        row = (part * tiles_each + tile) * ROWS + tl.arange(0, ROWS)
        head, token = row % HEADS, (row // HEADS).to(tl.int64)
        mask = (row < rows)[:, None] & (cols < width)[None, :]
        table = token[:, None] * table_row + pairs[None, :]
        in_table = (row < rows)[:, None] & (pairs < width // 2)[None, :]
        cos = tl.load(cos_ptr + table, mask=in_table, other=0.0)
        sin = tl.load(sin_ptr + table, mask=in_table, other=0.0)
        place = (sample * x_sample + token * x_row + head * x_head)[:, None] + cols[None, :]
        from_ = (sample * grad_sample + token * grad_row + head * grad_head)[:, None]
        dx, terms = turn_norm_backward(  # pyright: ignore[reportGeneralTypeIssues]
            x_ptr + place, grad_ptr + from_ + cols[None, :], weight, cos, sin, mask, width, eps,
            ROWS, PAIRS,
        )  # fmt: skip
        dweight += terms
        out = (sample * rows + row)[:, None] * width + cols[None, :]
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    share = tl.sum(dweight, axis=0)
    out = (sample * tl.num_programs(0) + part) * width + cols
    tl.store(dweight_ptr + out, share, mask=cols < width)

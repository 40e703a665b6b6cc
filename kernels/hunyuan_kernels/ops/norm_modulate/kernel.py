"""Triton kernels of the modulated LayerNorm: one row per step, statistics in float32."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def norm_modulate_fwd_kernel(
    x_ptr, shift_ptr, scale_ptr, y_ptr, mean_ptr, rstd_ptr,
    tokens, width, x_sample, x_row, shift_sample, scale_sample, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise row ``program_id(0)`` of [B * S, D]."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + sample * x_sample + token * x_row + cols, mask=inside, other=0.0)
    x = x.to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / width + eps)
    shift = tl.load(shift_ptr + sample * shift_sample + cols, mask=inside, other=0.0)
    scale = tl.load(scale_ptr + sample * scale_sample + cols, mask=inside, other=0.0)
    y = centred * rstd * (1.0 + scale.to(tl.float32)) + shift.to(tl.float32)
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["tokens", "rows_each"])
def norm_modulate_bwd_kernel(
    grad_ptr, x_ptr, scale_ptr, mean_ptr, rstd_ptr, dx_ptr, dshift_ptr, dscale_ptr,
    tokens, width, rows_each, grad_sample, grad_row, x_sample, x_row, scale_sample,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of one program: dx, and their share of dshift and dscale [B, programs, D].

    With n = (x - mean) * rstd and h = grad * (1 + scale):
    dx = rstd * (h - mean(h) - n * mean(h * n)).
    """
    part, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    scale = tl.load(scale_ptr + sample * scale_sample + cols, mask=inside, other=0.0)
    factor = 1.0 + scale.to(tl.float32)
    dshift = tl.full((BLOCK,), 0.0, tl.float32)
    dscale = tl.full((BLOCK,), 0.0, tl.float32)
    for step in range(rows_each):
        token = part * rows_each + step
        live = inside & (token < tokens)
        row = sample * tokens + token
        grad = tl.load(
            grad_ptr + sample * grad_sample + token * grad_row + cols, mask=live, other=0.0
        ).to(tl.float32)
        x = tl.load(x_ptr + sample * x_sample + token * x_row + cols, mask=live, other=0.0)
        mean = tl.load(mean_ptr + row, mask=token < tokens, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=token < tokens, other=0.0)
        normed = tl.where(live, (x.to(tl.float32) - mean) * rstd, 0.0)
        dshift += grad
        dscale += grad * normed
        h = grad * factor
        h_mean = tl.sum(h, axis=0) / width
        projection = tl.sum(h * normed, axis=0) / width
        dx = (h - h_mean - normed * projection) * rstd
        tl.store(dx_ptr + row * width + cols, dx.to(dx_ptr.dtype.element_ty), mask=live)
    out = (sample * tl.num_programs(0) + part) * width + cols
    tl.store(dshift_ptr + out, dshift, mask=inside)
    tl.store(dscale_ptr + out, dscale, mask=inside)

"""Triton kernels of the gated residual: rows of one sample share its gate."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])
def gated_residual_fwd_kernel(
    x_ptr, gate_ptr, branch_ptr, out_ptr,
    tokens, width, x_sample, x_row, gate_sample, branch_sample, branch_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Row ``program_id(0)`` of [B * S, D]."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + sample * x_sample + token * x_row + cols, mask=inside, other=0.0)
    gate = tl.load(gate_ptr + sample * gate_sample + cols, mask=inside, other=0.0)
    branch = tl.load(
        branch_ptr + sample * branch_sample + token * branch_row + cols, mask=inside, other=0.0
    )
    out = x.to(tl.float32) + gate.to(tl.float32) * branch.to(tl.float32)
    tl.store(out_ptr + row * width + cols, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens", "rows_each"])
def gated_residual_bwd_kernel(
    grad_ptr, gate_ptr, branch_ptr, dbranch_ptr, dgate_ptr,
    tokens, width, rows_each, grad_sample, grad_row, gate_sample, branch_sample, branch_row,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of one program: dbranch, and their share of dgate [B, programs, D]."""
    part, sample = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    cols = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(gate_ptr + sample * gate_sample + cols, mask=inside, other=0.0).to(tl.float32)
    dgate = tl.full((BLOCK,), 0.0, tl.float32)
    for step in range(rows_each):
        token = part * rows_each + step
        live = inside & (token < tokens)
        grad = tl.load(
            grad_ptr + sample * grad_sample + token * grad_row + cols, mask=live, other=0.0
        ).to(tl.float32)
        branch = tl.load(
            branch_ptr + sample * branch_sample + token * branch_row + cols, mask=live, other=0.0
        ).to(tl.float32)
        dgate += grad * branch
        dbranch = (grad * gate).to(dbranch_ptr.dtype.element_ty)
        tl.store(dbranch_ptr + (sample * tokens + token) * width + cols, dbranch, mask=live)
    tl.store(dgate_ptr + (sample * tl.num_programs(0) + part) * width + cols, dgate, mask=inside)

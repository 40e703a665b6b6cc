"""Triton kernel of the merge: tiles of [rows, E], a row being one head of one query."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def lse_merge_kernel(
    out_ptr, lse_ptr, block_ptr, block_lse_ptr, merged_ptr,
    rows, width,
    out_sample, out_row, out_head, block_sample, block_row, block_head,
    lse_sample, lse_head, lse_row, new_sample, new_head, new_row,
    to_sample, to_head, to_row,
    HEADS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """ROWS of the S * A rows [E] of one sample."""
    sample = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    head, token = row % HEADS, (row // HEADS).to(tl.int64)
    lse = tl.load(
        lse_ptr + sample * lse_sample + head * lse_head + token * lse_row, mask=live, other=0.0
    ).to(tl.float32)
    new = tl.load(
        block_lse_ptr + sample * new_sample + head * new_head + token * new_row,
        mask=live, other=0.0,
    ).to(tl.float32)  # fmt: skip
    top = tl.maximum(lse, new)
    base = tl.where(top == float("-inf"), 0.0, top)  # else -inf - -inf = nan
    old_weight, new_weight = tl.exp(lse - base), tl.exp(new - base)
    total = old_weight + new_weight
    merged = tl.where(total > 0.0, base + tl.log(total), top)
    share = 1.0 / tl.where(total > 0.0, total, 1.0)
    to = merged_ptr + sample * to_sample + head * to_head + token * to_row
    tl.store(to, merged, mask=live)
    cols = tl.arange(0, COLS)
    mask = live[:, None] & (cols < width)[None, :]
    place = (sample * out_sample + token * out_row + head * out_head)[:, None] + cols[None, :]
    out = tl.load(out_ptr + place, mask=mask, other=0.0).to(tl.float32)
    from_ = (sample * block_sample + token * block_row + head * block_head)[:, None]
    block = tl.load(block_ptr + from_ + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    out = out * (old_weight * share)[:, None] + block * (new_weight * share)[:, None]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)

"""Triton kernel of AdamW and the moving average: every value is read and written once."""

import triton
import triton.language as tl


@triton.jit
def adamw_ema_kernel(
    param_ptr, grad_ptr, first_ptr, second_ptr, ema_ptr, copy_ptr,
    corrections_ptr, skip_ptr, factor_ptr,
    count, decay, step_size, one_minus_beta1, beta2, one_minus_beta2, eps, one_minus_ema,
    HAS_EMA: tl.constexpr, HAS_COPY: tl.constexpr, HAS_SKIP: tl.constexpr,
    HAS_FACTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of one parameter; ``decay`` is 1 - lr * weight_decay, ``step_size`` is lr.

    ``corrections`` holds 1 / (1 - beta1^t) and 1 / sqrt(1 - beta2^t).
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    if HAS_SKIP:  # noqa: SIM102 - the pointer is None otherwise
        if tl.load(skip_ptr) != 0.0:
            return
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_FACTOR:
        grad = grad * tl.load(factor_ptr)
    param = tl.load(param_ptr + at, mask=mask, other=0.0)
    first = tl.load(first_ptr + at, mask=mask, other=0.0)
    second = tl.load(second_ptr + at, mask=mask, other=0.0)
    first += one_minus_beta1 * (grad - first)
    second = beta2 * second + one_minus_beta2 * grad * grad
    denominator = tl.sqrt(second) * tl.load(corrections_ptr + 1) + eps
    param = param * decay - step_size * tl.load(corrections_ptr) * first / denominator
    tl.store(param_ptr + at, param, mask=mask)
    tl.store(first_ptr + at, first, mask=mask)
    tl.store(second_ptr + at, second, mask=mask)
    if HAS_EMA:
        ema = tl.load(ema_ptr + at, mask=mask, other=0.0)
        tl.store(ema_ptr + at, ema + one_minus_ema * (param - ema), mask=mask)
    if HAS_COPY:
        tl.store(copy_ptr + at, param.to(copy_ptr.dtype.element_ty), mask=mask)

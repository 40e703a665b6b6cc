"""Triton kernels of the tanh-approximated GELU and of its backward with the value beside it.

With u = sqrt(2/pi) (x + 0.044715 x^3), 0.5 (1 + tanh(u)) is sigmoid(2u), which needs no tanh and
loses no digits for large negative x. 2 sqrt(2/pi) is 1.59577, times 0.044715 it is 0.0713548.
"""

import triton
import triton.language as tl


@triton.jit
def gelu_fwd_kernel(x_ptr, y_ptr, width, x_row, BLOCK: tl.constexpr):
    """Columns of one row: x * sigmoid(2u)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    y = x / (1.0 + tl.exp(-x * (1.5957691216057308 + 0.07135481627260025 * x * x)))
    tl.store(y_ptr + row * width + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_bwd_kernel(x_ptr, grad_ptr, y_ptr, width, x_row, BLOCK: tl.constexpr):
    """Write gelu(x) to y and put the gradient of x in place of that of y."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    here = row * width + cols
    x = tl.load(x_ptr + row * x_row + cols, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + here, mask=inside, other=0.0).to(tl.float32)
    s = 1.0 / (1.0 + tl.exp(-x * (1.5957691216057308 + 0.07135481627260025 * x * x)))
    slope = s + x * s * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * x * x)
    tl.store(y_ptr + here, (x * s).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_ptr + here, (grad * slope).to(grad_ptr.dtype.element_ty), mask=inside)

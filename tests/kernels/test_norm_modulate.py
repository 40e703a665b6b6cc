"""The modulated LayerNorm: numbers, gradients, strides and what it keeps."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_kernels.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(batch, tokens, width, dtype, device="cpu", seed=0):
    torch.manual_seed(seed)
    x = (3 * torch.randn(batch, tokens, 2 * width, device=device) + 1).to(dtype)[..., :width]
    # As the blocks give them: cuts of one linear's output.
    shift, scale, _ = torch.randn(batch, 3 * width, device=device).to(dtype).chunk(3, dim=-1)
    return tuple(t.detach().requires_grad_() for t in (x, shift, scale))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 64), (2, 21, 96), (1, 35, 200)])
def test_kernel_is_no_worse_than_eager(batch, tokens, width, dtype):
    check("norm_modulate", *inputs(batch, tokens, width, dtype))


@pytest.mark.kernel
@settings(max_examples=4, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 24), width=st.integers(16, 80))
def test_any_shape(batch, tokens, width):
    check("norm_modulate", *inputs(batch, tokens, width, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 4608), (2, 1281), (1, 30_616)])
def test_real_sizes(batch, tokens, dtype):
    check("norm_modulate", *inputs(batch, tokens, 3072, dtype, "cuda"))

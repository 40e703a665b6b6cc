"""QK norm and rotary positions: numbers, gradients, packed strides, unrotated rows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_kernels.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(batch, tokens, heads, width, dtype, device="cpu", seed=0):
    torch.manual_seed(seed)
    # q and k of a packed projection that also holds v and something behind it.
    packed = torch.randn(batch, tokens, 3 * heads * width + 8, device=device).to(dtype)
    q, k, _ = packed[..., :-8].unflatten(-1, (3, heads, width)).unbind(2)
    weights = (1 + 0.3 * torch.randn(2, width, device=device)).to(dtype).unbind()
    angle = 20 * torch.rand(tokens, width // 2, device=device)
    angle[tokens * 2 // 3 :] = 0  # text
    learned = (t.detach().requires_grad_() for t in (q, k, *weights))
    return *learned, angle.cos(), angle.sin()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"), [(1, 1, 2, 16), (2, 37, 3, 64), (1, 20, 2, 24)]
)
def test_kernel_is_no_worse_than_eager(batch, tokens, heads, width, dtype):
    check("qk_norm_rope", *inputs(batch, tokens, heads, width, dtype))


@pytest.mark.kernel
def test_several_tiles_per_program():
    # 270 heads are 34 tiles of 8, cut into programs of 16 tiles.
    check("qk_norm_rope", *inputs(1, 135, 2, 128, torch.float32))


@pytest.mark.kernel
@settings(max_examples=4, deadline=None)
@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 40), heads=st.integers(1, 4),
    pairs=st.integers(4, 40),
)  # fmt: skip
def test_any_shape(batch, tokens, heads, pairs):
    check("qk_norm_rope", *inputs(batch, tokens, heads, 2 * pairs, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 4608), (2, 1281), (1, 30_616)])
def test_real_sizes(batch, tokens, dtype):
    check("qk_norm_rope", *inputs(batch, tokens, 24, 128, dtype, "cuda"))

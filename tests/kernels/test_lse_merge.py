"""The merge of attention over further keys: numbers, rows without keys, strides."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_kernels import dispatch, lse_merge
from hunyuan_kernels.testing import check


def inputs(batch, tokens, heads, width, dtype, device="cpu", seed=0):
    torch.manual_seed(seed)
    out = torch.randn(batch, tokens, heads, width, device=device)
    block = torch.randn(batch, heads, tokens, width, device=device).to(dtype).transpose(1, 2)
    lse = 8 * torch.randn(batch, heads, tokens, device=device)
    # As one kernel of torch gives it: heads fastest.
    block_lse = 8 * torch.randn(batch, tokens, heads, device=device).transpose(1, 2)
    return out, lse, block, block_lse


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width"), [(1, 1, 1, 16), (2, 37, 3, 64), (1, 21, 2, 24)]
)
def test_kernel_is_no_worse_than_eager(batch, tokens, heads, width, dtype):
    check("lse_merge", *inputs(batch, tokens, heads, width, dtype))


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:divide by zero encountered in log")
def test_rows_without_keys():
    out, lse, block, block_lse = inputs(1, 4, 1, 16, torch.float32)
    lse[0, 0, :2] = -math.inf
    block_lse[0, 0, 1:3] = -math.inf
    before = out.clone()
    check("lse_merge", out, lse, block, block_lse)
    with dispatch.also_on("cpu"):
        merged = lse_merge(out, lse, block, block_lse)
    torch.testing.assert_close(out[0, 0], block[0, 0])
    assert not out[0, 1].any()
    torch.testing.assert_close(out[0, 2], before[0, 2])
    assert merged[0, 0, 1] == -math.inf


@pytest.mark.kernel
@settings(max_examples=4, deadline=None)
@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 40), heads=st.integers(1, 4),
    width=st.integers(1, 80),
)  # fmt: skip
def test_any_shape(batch, tokens, heads, width):
    check("lse_merge", *inputs(batch, tokens, heads, width, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 4608), (2, 1281), (1, 30_616)])
def test_real_sizes(batch, tokens, dtype):
    check("lse_merge", *inputs(batch, tokens, 24, 128, dtype, "cuda"))

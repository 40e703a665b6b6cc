"""The linear over attention output and GELU: numbers, gradients, what it keeps and its FLOPs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hunyuan_kernels import dispatch, gelu_linear2
from hunyuan_kernels.testing import check

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(batch, tokens, width, inner, dtype, device="cpu", seed=0):
    torch.manual_seed(seed)
    attn = torch.randn(batch, tokens, width, device=device).to(dtype) / 3
    mlp = 2 * torch.randn(batch, tokens, 3 * width + inner, device=device)
    mlp = mlp.to(dtype)[..., 3 * width :]  # behind q, k and v
    weight = torch.randn(width, width + inner, device=device).to(dtype) / (width + inner) ** 0.5
    bias = torch.randn(width, device=device).to(dtype) / 10
    return tuple(t.detach().requires_grad_() for t in (attn, mlp, weight, bias))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "width", "inner"), [(1, 1, 32, 128), (2, 13, 48, 192), (1, 9, 16, 2100)]
)
def test_kernel_is_no_worse_than_eager(batch, tokens, width, inner, dtype):
    check("gelu_linear2", *inputs(batch, tokens, width, inner, dtype))


@pytest.mark.kernel
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_large_inputs_saturate():
    attn, mlp, weight, bias = inputs(1, 4, 8, 32, torch.float32)
    mlp = (1e4 * mlp.detach()).requires_grad_()
    check("gelu_linear2", attn, mlp, weight, bias)


@pytest.mark.kernel
@settings(max_examples=4, deadline=None)
@given(
    batch=st.integers(1, 2), tokens=st.integers(1, 12), width=st.integers(1, 40),
    inner=st.integers(1, 90),
)  # fmt: skip
def test_any_shape(batch, tokens, width, inner):
    check("gelu_linear2", *inputs(batch, tokens, width, inner, torch.float32))


@pytest.mark.kernel
def test_keeps_its_inputs_and_nothing_else():
    tensors = inputs(1, 5, 8, 32, torch.float32)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with dispatch.also_on("cpu"), hooks:
        gelu_linear2(*tensors)
    assert [t.data_ptr() for t in kept] == [t.data_ptr() for t in tensors[:3]]


@pytest.mark.kernel
def test_its_flops_are_counted():
    tensors = inputs(2, 5, 8, 32, torch.float32)
    with dispatch.also_on("cpu"), FlopCounterMode(display=False) as fused:
        gelu_linear2(*tensors).sum().backward()
    with FlopCounterMode(display=False) as eager:
        gelu_linear2(*tensors).sum().backward()
    assert fused.get_total_flops() == eager.get_total_flops() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 4608), (2, 1281)])
def test_real_sizes(batch, tokens, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    check("gelu_linear2", *inputs(batch, tokens, 3072, 12_288, dtype, "cuda"))

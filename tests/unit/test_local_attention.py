"""The seam of kernels: output, log-sum-exp and gradients, and samples whose keys are absent."""

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from hunyuan_train.parallel import attention_kernels as kernels
from hunyuan_train.parallel.attention_choice import AttentionChoice, attention_fixed
from hunyuan_train.parallel.key_layout import key_layout
from hunyuan_train.parallel.local_attention import (
    BACKENDS,
    attend,
    attend_backward,
    choose_backend,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
REFERENCE = AttentionChoice(dict.fromkeys((False, True), "reference"))
ANY_DTYPE = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def heads(batch: int, rows: int, dtype: torch.dtype, seed: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, rows, 3, 16, generator=generator, dtype=torch.float64).to(
        device, dtype
    )


def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The definition, in float64."""
    scores = torch.einsum("bqae,bkae->baqk", q.double(), k.double()) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    return torch.einsum("baqk,bkae->bqae", scores.softmax(-1), v.double()), scores.logsumexp(-1)


def assert_near(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.shape == wanted.shape
    found, wanted = found.detach().cpu().double(), wanted.detach().cpu().double()
    error = (found - wanted).abs().max()
    assert error <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))


def check_against_definition(dtype: torch.dtype, masked: bool, device: str = "cpu") -> None:
    q, k, v, grad = (
        heads(2, rows, dtype, seed, device) for seed, rows in enumerate((37, 53, 53, 37))
    )
    mask = None
    if masked:
        mask = torch.rand(2, 53, generator=torch.Generator().manual_seed(9)).to(device) > 0.4
    out, lse = attend(q, k, v, mask)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    wanted, wanted_lse = whole(leaves[0], leaves[1], leaves[2], mask)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(out, wanted, dtype)
    assert_near(lse, wanted_lse, dtype)
    found = attend_backward(grad, q, k, v, mask, out, lse)
    for one, other in zip(found, torch.autograd.grad(wanted, leaves, grad.double()), strict=True):
        assert one.dtype == dtype
        assert_near(one, other, dtype)


@ANY_DTYPE
@pytest.mark.parametrize("masked", [False, True])
def test_cpu_attention_is_the_definition(dtype: torch.dtype, masked: bool) -> None:
    check_against_definition(dtype, masked)


@ANY_DTYPE
@pytest.mark.parametrize("masked", [False, True])
def test_reference_is_the_definition_in_pieces(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool
) -> None:
    monkeypatch.setattr(kernels, "REFERENCE_SCORES", 2 * 3 * 53 * 5)  # five queries at a time
    with attention_fixed(REFERENCE):
        check_against_definition(dtype, masked)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("dtype", "names"),
    [
        (torch.bfloat16, ("flash", "efficient")),
        (torch.float32, ("efficient", "efficient")),
        (torch.float64, ("reference", "reference")),
    ],
    ids=str,
)
def test_cuda_attention_is_the_definition(
    dtype: torch.dtype, names: tuple[str, str], masked: bool
) -> None:
    q = heads(1, 1, dtype, 0, "cuda")
    assert choose_backend(q, q, masked).name == names[masked]
    check_against_definition(dtype, masked, "cuda")


def check_absent_keys(dtype: torch.dtype, device: str = "cpu") -> None:
    q, k, v, grad = (heads(3, rows, dtype, seed, device) for seed, rows in enumerate((7, 5, 5, 7)))
    mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    mask[1] = False
    mask[2, 2:] = False
    out, lse = attend(q, k, v, mask)
    assert not out[1].any()
    assert bool((lse[1] == -torch.inf).all())
    assert bool(lse[::2].isfinite().all())
    # The merged log-sum-exp of such a sample is finite when other chunks hold its keys.
    for merged in (lse, lse.masked_fill(lse == -torch.inf, -90.0)):
        grads = attend_backward(grad, q, k, v, mask, out, merged)
        for found in grads:
            assert bool(found.isfinite().all())
            assert not found[1].any()
            assert found[0].any()
        assert not grads[1][2, 2:].any()


@ANY_DTYPE
def test_a_sample_without_keys_has_no_part(dtype: torch.dtype) -> None:
    check_absent_keys(dtype)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_sample_without_keys_has_no_part_on_cuda(dtype: torch.dtype) -> None:
    check_absent_keys(dtype, "cuda")


def test_reference_gives_a_sample_without_keys_no_part() -> None:
    with attention_fixed(REFERENCE):
        check_absent_keys(torch.float32)


def test_no_keys_at_all_never_reach_a_kernel() -> None:
    q, none = heads(2, 4, torch.float32, 0), heads(2, 0, torch.float32, 1)
    out, lse = attend(q, none, none, torch.ones(2, 0, dtype=torch.bool))
    assert not out.any()
    assert lse.shape == (2, 3, 4)
    assert bool((lse == -torch.inf).all())
    dq, dk, dv = attend_backward(q, q, none, none, None, out, lse)
    assert dq.shape == q.shape
    assert not dq.any()
    assert dk.shape == dv.shape == none.shape


def test_gradients_of_key_pieces_add_up_with_the_merged_result() -> None:
    """What a ring relies on: every piece gets the output and log-sum-exp over all keys."""
    q, k, v, grad = (heads(2, 12, torch.float64, seed) for seed in range(4))
    out, lse = attend(q, k, v, None)
    wanted = attend_backward(grad, q, k, v, None, out, lse)
    pieces = [
        attend_backward(grad, q, one, two, None, out, lse)
        for one, two in zip(k.split(5, dim=1), v.split(5, dim=1), strict=True)
    ]
    assert_near(sum((piece[0] for piece in pieces), torch.zeros_like(q)), wanted[0], q.dtype)
    for index in (1, 2):
        assert_near(torch.cat([piece[index] for piece in pieces], 1), wanted[index], q.dtype)


def test_inputs_may_have_any_strides() -> None:
    q, k, v = (heads(2, 6, torch.float32, seed) for seed in range(3))
    wanted, lse = attend(q, k, v, None)
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]
    torch.testing.assert_close(attend(strided[0], strided[1], strided[2], None)[0], wanted)
    ones = torch.ones(()).expand_as(q)  # the gradient of a sum has stride 0
    found = attend_backward(ones, strided[0], strided[1], strided[2], None, wanted, lse)
    for one, other in zip(
        found, attend_backward(torch.ones_like(q), q, k, v, None, wanted, lse), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (kernels.FLASH, torch.bfloat16),
        (kernels.CUDNN, torch.bfloat16),
        (kernels.EFFICIENT, torch.bfloat16),
        (kernels.EFFICIENT, torch.float32),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_cuda_calls_match_the_schemas_of_the_kernels(
    backend: kernels.Backend, dtype: torch.dtype, masked: bool
) -> None:
    """Without a GPU: shapes and arguments against torch's meta kernels."""
    q, k = (torch.empty(2, rows, 3, 16, dtype=dtype, device="meta") for rows in (37, 53))
    layout = key_layout(torch.ones(2, 53, dtype=torch.bool, device="meta") if masked else None)
    out, lse = backend.forward(q, k, k, layout)
    assert out.shape == q.shape
    assert lse.shape == (2, 3, 37)
    grads = backend.backward(q, q, k, k, layout, out, lse)
    assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]


def test_bias_rows_are_aligned() -> None:
    layout = key_layout(torch.ones(2, 53, dtype=torch.bool))
    assert layout is not None
    assert layout.bias(torch.bfloat16).shape == (2, 1, 1, 53)
    assert layout.bias(torch.bfloat16).stride(0) == 64  # efficient attention reads 16 at a time


@pytest.mark.parametrize(
    ("name", "found", "dtype", "width", "reason"),
    [
        ("flash", (8, 0), torch.bfloat16, 128, None),
        ("flash", (7, 5), torch.bfloat16, 128, "compute capability 8.0 or more, not 7.5"),
        ("flash", (9, 0), torch.float32, 128, "takes bfloat16 or float16, not float32"),
        ("flash", (9, 0), torch.float16, 100, "head sizes 8, 16, .. 256, not 100"),
        ("flash", (8, 9), torch.float16, 256, "head sizes 8, 16, .. 192, not 256"),
        ("cudnn", (9, 0), torch.bfloat16, 128, None),
        ("cudnn", (9, 0), torch.bfloat16, 256, "head sizes 8, 16, .. 128, not 256"),
        ("efficient", (7, 0), torch.float32, 512, None),
        ("efficient", (9, 0), torch.float64, 128, "not float64"),
        ("reference", (5, 0), torch.float64, 7, None),
        ("cpu", (9, 0), torch.float32, 128, "needs a CPU, not cuda"),
    ],
)
def test_kernels_say_what_they_do_not_take(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    found: tuple[int, int],
    dtype: torch.dtype,
    width: int,
    reason: str | None,
) -> None:
    monkeypatch.setattr(kernels, "capability", lambda device: found)
    with FakeTensorMode():
        q = torch.empty(1, 8, 2, width, dtype=dtype, device="cuda")
        refusal = BACKENDS[name].refuses(q, q, True)
    assert (refusal is None) if reason is None else (reason in (refusal or ""))


def test_cudnn_is_not_given_a_single_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "capability", lambda device: (9, 0))
    with FakeTensorMode():
        q, one = (torch.empty(1, n, 2, 64, dtype=torch.bfloat16, device="cuda") for n in (8, 1))
        assert kernels.CUDNN.takes(q, q, False)
        assert not kernels.CUDNN.takes(q, one, False)
        assert not kernels.CUDNN.takes(one, q, False)

"""The seam of kernels: output, log-sum-exp and gradients, and samples whose keys are absent."""

import pytest
import torch
from torch import Tensor

from hunyuan_train.parallel import local_attention as local
from hunyuan_train.parallel.local_attention import attend, attend_backward

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
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
    monkeypatch.setattr(local, "CPU", local.REFERENCE)
    monkeypatch.setattr(local, "REFERENCE_SCORES", 2 * 3 * 53 * 5)  # five queries at a time
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
    assert local.choose_backend(heads(1, 1, dtype, 0, "cuda"), masked).name == names[masked]
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


def test_reference_gives_a_sample_without_keys_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "CPU", local.REFERENCE)
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


def test_cuda_calls_match_the_schemas_of_the_kernels() -> None:
    """Without a GPU: shapes and arguments against torch's meta kernels."""
    for backend, dtype, masked in (
        (local.FLASH, torch.bfloat16, False),
        (local.EFFICIENT, torch.bfloat16, True),
        (local.EFFICIENT, torch.float32, False),
    ):
        q, k = (torch.empty(2, 3, rows, 16, dtype=dtype, device="meta") for rows in (37, 53))
        mask = torch.ones(2, 53, dtype=torch.bool, device="meta") if masked else None
        bias, _ = local._key_bias(mask, dtype)
        if bias is not None:
            assert bias.shape == (2, 1, 1, 53)
            assert bias.stride(0) == 64  # rows aligned to 16 values
        out, lse = backend.forward(q, k, k, bias)
        assert out.shape == q.shape
        assert lse.shape == (2, 3, 37)
        grads = backend.backward(q, q, k, k, bias, out, lse)
        assert [grad.shape for grad in grads] == [q.shape, k.shape, k.shape]

"""Every attention kernel that is on this GPU, against the definition in float64."""

import pytest
import torch
from torch import Tensor

from hunyuan_train.memory.config import AttentionKernel
from hunyuan_train.parallel import attention_kernels as kernels
from hunyuan_train.parallel.attention_choice import (
    AttentionChoice,
    AttentionInputs,
    attention_fixed,
    choose_attention,
)
from hunyuan_train.parallel.key_layout import key_layout
from hunyuan_train.parallel.local_attention import (
    BACKENDS,
    attend,
    attend_backward,
    attend_backward_with,
    attend_with,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here"),
]

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 5e-3}
ROWS = 333  # no multiple of any block


def heads(rows: int, dtype: torch.dtype, seed: int, width: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(3, rows, 2, width, generator=generator, device="cuda").to(dtype)


def ragged(keys: int) -> Tensor:
    """Padding behind one sample, holes in another; the third is whole."""
    mask = torch.ones(3, keys, dtype=torch.bool, device="cuda")
    mask[0, keys // 3 :] = False
    mask[1, ::3] = False
    return mask


def definition(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None
) -> tuple[Tensor, ...]:
    """Return output, log-sum-exp, dq, dk and dv."""
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    scores = torch.einsum("bqae,bkae->baqk", q, k) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], -torch.inf)
    out = torch.einsum("baqk,bkae->bqae", scores.softmax(-1), v)
    grads = torch.autograd.grad(out, (q, k, v), grad.double())
    return out.detach(), scores.logsumexp(-1).detach(), *grads


def near(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    error = (found.double() - wanted).abs().max() / wanted.abs().max()
    assert float(error) <= tolerance


def taken(name: str, q: Tensor, masked: bool) -> kernels.Backend:
    reason = BACKENDS[name].refuses(q, q, masked)
    if reason is not None:
        pytest.skip(reason)
    return BACKENDS[name]


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("name", BACKENDS)
def test_a_kernel_is_the_definition(
    name: str, dtype: torch.dtype, masked: bool, width: int
) -> None:
    q, k, v, grad = (heads(ROWS + 20 * (i in (1, 2)), dtype, i, width) for i in range(4))
    backend = taken(name, q, masked)
    mask = ragged(k.shape[1]) if masked else None
    out, lse = attend_with(backend, q, k, v, mask)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    grads = attend_backward_with(backend, grad, q, k, v, mask, out, lse)
    wanted = definition(q, k, v, grad, mask)
    near(lse, wanted[1], 2e-3)
    for found, want in zip((out, *grads), (wanted[0], *wanted[2:]), strict=True):
        near(found, want, TOLERANCE[dtype])
    if mask is not None:
        assert not grads[1][~mask].any()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", BACKENDS)
def test_pieces_merge_to_the_whole_as_in_a_ring(name: str, masked: bool) -> None:
    q, k, v, grad = (heads(ROWS, torch.bfloat16, i, 128) for i in range(4))
    backend = taken(name, q, masked)
    mask = ragged(ROWS) if masked else None  # the first sample has no key in the second piece
    cut = 150
    pieces = [(k[:, :cut], v[:, :cut]), (k[:, cut:], v[:, cut:])]
    masks = [None if mask is None else m.contiguous() for m in _cut(mask, cut)]
    wanted = definition(q, k, v, grad, mask)
    parts = [attend_with(backend, q, *pair, m) for pair, m in zip(pieces, masks, strict=True)]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    weights = [(part - lse).exp().transpose(1, 2)[..., None] for _, part in parts]
    out = weights[0] * parts[0][0] + weights[1] * parts[1][0]
    near(out, wanted[0], 3e-2)
    near(lse, wanted[1], 2e-3)
    shares = [
        attend_backward_with(backend, grad, q, *pair, m, out.to(q.dtype), lse)
        for pair, m in zip(pieces, masks, strict=True)
    ]
    near(shares[0][0].float() + shares[1][0].float(), wanted[2], 3e-2)
    for index in (1, 2):
        near(torch.cat([share[index] for share in shares], 1), wanted[index + 2], 3e-2)


def _cut(mask: Tensor | None, cut: int) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if mask is None else (mask[:, :cut], mask[:, cut:])


@pytest.mark.parametrize("name", BACKENDS)
def test_a_sample_without_keys_has_no_part(name: str) -> None:
    q = heads(ROWS, torch.bfloat16, 0, 128)
    backend = taken(name, q, True)
    mask = ragged(ROWS)
    mask[1] = False
    out, lse = attend_with(backend, q, q, q, mask)
    assert not out[1].any()
    assert bool((lse[1] == -torch.inf).all())
    assert bool(lse[::2].isfinite().all())
    for merged in (lse, lse.masked_fill(lse == -torch.inf, -40.0)):
        for found in attend_backward_with(backend, q, q, q, q, mask, out, merged):
            assert bool(found.isfinite().all())
            assert not found[1].any()
            assert found[0].any()


@pytest.mark.parametrize("name", BACKENDS)
def test_strides_do_not_matter(name: str) -> None:
    """Views of a fused projection, and gradients of several layouts one after the other."""
    fused = torch.cat([heads(ROWS, torch.bfloat16, i, 128) for i in range(3)], dim=-1)
    q, k, v = fused.chunk(3, dim=-1)
    backend = taken(name, q, False)
    grad = heads(ROWS, torch.bfloat16, 5, 128)
    wanted = definition(q, k, v, grad, None)
    out, lse = attend_with(backend, q, k, v, None)
    near(out, wanted[0], 3e-2)
    layouts = (grad, grad.transpose(1, 2).contiguous().transpose(1, 2), grad.mT.contiguous().mT)
    for one in layouts:
        for given in (out, out.transpose(1, 2).contiguous().transpose(1, 2)):
            found = attend_backward_with(backend, one, q, k, v, None, given, lse)
            for part, want in zip(found, wanted[2:], strict=True):
                near(part, want, 3e-2)


def test_a_layout_does_not_wait_for_the_gpu() -> None:
    q, mask = heads(ROWS, torch.bfloat16, 0, 128), ragged(ROWS)
    with attention_fixed(AttentionChoice({True: "flash"})):
        attend(q, q, q, mask)  # loads kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            fresh = mask.clone()
            out, lse = attend(q, q, q, fresh)
            attend_backward(q, q, q, q, fresh, out, lse)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert key_layout(fresh) is key_layout(fresh)


def test_the_measured_choice_runs() -> None:
    inputs = AttentionInputs(
        device=torch.device("cuda", 0), dtype=torch.bfloat16, heads=24, head_dim=128, tokens=4608
    )
    choice = choose_attention(AttentionKernel.auto, inputs)
    assert {"flash", "efficient"} <= set(choice.milliseconds[False])
    assert all(choice.kernels[case] != "reference" for case in inputs.cases)
    q = heads(ROWS, torch.bfloat16, 0, 128)
    with attention_fixed(choice):
        out, _ = attend(q, q, q, ragged(ROWS))
    assert bool(out.isfinite().all())

"""Packing keys that exist end to end, and the layout that all blocks of a micro-batch share."""

import gc
import weakref

import pytest
import torch
from torch import Tensor
from varlen_kernel import varlen_backward, varlen_forward

from hunyuan_train.parallel import key_layout as layouts
from hunyuan_train.parallel import local_attention as local
from hunyuan_train.parallel.attention_choice import AttentionChoice, attention_fixed
from hunyuan_train.parallel.attention_kernels import VarlenKernel, varlen_backend
from hunyuan_train.parallel.key_layout import KeyLayout, key_layout
from hunyuan_train.parallel.local_attention import attend, attend_backward


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> AttentionChoice:
    backend = varlen_backend(
        "packed", lambda q, k, masked: None, VarlenKernel(varlen_forward, varlen_backward)
    )
    monkeypatch.setitem(local.BACKENDS, "packed", backend)
    return AttentionChoice({False: "packed", True: "packed"})


def rows(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, count, 3, 8, generator=generator, dtype=torch.float64).to(dtype)


def ragged_mask(keys: int) -> Tensor:
    """Padding behind, holes, no keys at all, and none missing."""
    mask = torch.rand(4, keys, generator=torch.Generator().manual_seed(5)) > 0.5
    mask[0] = torch.arange(keys) < keys - 3
    mask[2] = False
    mask[3] = True
    return mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_packed_keys_give_what_a_bias_gives(
    packed: AttentionChoice, dtype: torch.dtype, masked: bool
) -> None:
    q, k, v, grad = (rows(n, seed, dtype) for seed, n in enumerate((11, 14, 14, 11)))
    mask = ragged_mask(14) if masked else None
    wanted, wanted_lse = attend(q, k, v, mask)
    # The log-sum-exp over further keys, as in a ring: the sample without keys here has some there.
    merged = wanted_lse.masked_fill(wanted_lse == -torch.inf, 2.0) + 0.25
    wanted_grads = attend_backward(grad, q, k, v, mask, wanted, merged)
    with attention_fixed(packed):
        out, lse = attend(q, k, v, mask)
        grads = attend_backward(grad, q, k, v, mask, wanted, merged)
    near = {"rtol": 1e-6, "atol": 1e-6} if dtype != torch.bfloat16 else {"rtol": 0, "atol": 0.02}
    torch.testing.assert_close(out, wanted, **near)
    torch.testing.assert_close(lse, wanted_lse, **near)
    for found, want in zip(grads, wanted_grads, strict=True):
        torch.testing.assert_close(found, want, **near)
    if mask is not None:
        assert not grads[1][~mask].any()  # not what happened to be in the memory


def test_packing_is_undone() -> None:
    mask = ragged_mask(9)
    layout = KeyLayout.of(mask)
    k = rows(9, 0)
    packed = layout.pack(k)
    assert packed.shape == (36, 3, 8)  # as large as before: how many there are is on the device
    ends = layout.ragged(5).k_offsets
    assert ends.dtype == torch.int32
    assert torch.equal(packed[: ends[-1]], k[layout.real])  # in order
    assert torch.equal(layout.unpack(packed), k.masked_fill(~layout.real[..., None, None], 0))
    assert layout.ragged(5).q_offsets.tolist() == [0, 5, 10, 15, 20]


def test_a_mask_is_laid_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    monkeypatch.setattr(
        layouts.KeyLayout,
        "of",
        classmethod(lambda cls, mask: made.append(mask.clone()) or cls(~mask.any(1), mask.clone())),
    )
    q, mask = rows(6, 0), torch.ones(4, 6, dtype=torch.bool)
    for _ in range(3):
        out, lse = attend(q, q, q, mask)
        attend_backward(q, q, q, q, mask, out, lse)
    assert len(made) == 1
    attend(q, q, q, mask.clone())  # an equal mask is another mask
    assert len(made) == 2


def test_a_changed_mask_is_laid_out_again() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    first = key_layout(mask)
    mask[0, 3:] = False
    second = key_layout(mask)
    assert first is not None
    assert second is not None
    assert not torch.equal(first.real, second.real)


def test_layouts_go_with_their_masks() -> None:
    before = len(layouts._layouts)
    mask = torch.ones(2, 6, dtype=torch.bool)
    layout = key_layout(mask)
    assert layout is not None
    gone = weakref.ref(layout.real)
    assert len(layouts._layouts) == before + 1
    del layout, mask
    gc.collect()
    assert len(layouts._layouts) == before
    assert gone() is None


def test_masks_of_inference_mode_are_laid_out() -> None:
    with torch.inference_mode():
        layout = key_layout(torch.ones(2, 6, dtype=torch.bool))
    assert layout is not None
    assert layout.real.all()

"""The calls into the flash-attn packages, against stand-ins with their published signatures."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from varlen_kernel import varlen_backward, varlen_forward

from hunyuan_train.parallel import flash_attn
from hunyuan_train.parallel.key_layout import Ragged
from hunyuan_train.parallel.local_attention import (
    BACKENDS,
    attend_backward_with,
    attend_with,
)

CPU = BACKENDS["cpu"]
WIDTH = 8


def bounds(cu_q: Any, cu_k: Any, longest_q: Any, longest_k: Any) -> Ragged | None:
    assert (cu_q is None) == (cu_k is None)
    return None if cu_q is None else Ragged(cu_q, cu_k, longest_q, longest_k)


def write(targets: tuple[Tensor, ...], found: tuple[Tensor, ...]) -> None:
    for target, one in zip(targets, found, strict=True):
        target.copy_(one)


def plain(dropout_p: Any, softmax_scale: Any, causal: Any, left: Any, right: Any) -> None:
    """Check the options that would change the result."""
    assert (dropout_p, causal, left, right) == (0.0, False, -1, -1)
    assert softmax_scale == pytest.approx(WIDTH**-0.5)


class Flash2:
    """flash_attn.flash_attn_interface 2.8."""

    @staticmethod
    def _wrapped_flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        plain(dropout_p, softmax_scale, causal, window_size_left, window_size_right)
        return (*varlen_forward(q, k, v, None), None, None)

    @staticmethod
    def _wrapped_flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale,
        causal, window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None,
        return_softmax=False, block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        plain(dropout_p, softmax_scale, causal, window_size_left, window_size_right)
        ragged = bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return (*varlen_forward(q, k, v, ragged), None, None)

    @staticmethod
    def _wrapped_flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
        window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        plain(dropout_p, softmax_scale, causal, window_size_left, window_size_right)
        write((dq, dk, dv), varlen_backward(dout, q, k, v, out, softmax_lse, None))

    @staticmethod
    def _wrapped_flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
        max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        plain(dropout_p, softmax_scale, causal, window_size_left, window_size_right)
        ragged = bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        write((dq, dk, dv), varlen_backward(dout, q, k, v, out, softmax_lse, ragged))


class Flash4:
    """flash_attn.cute.interface of 4.0, whose backward does not ask for the longest sequence."""

    @staticmethod
    def _flash_attn_fwd(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, page_table=None, softmax_scale=None, causal=False,
        return_lse=False,
    ):  # fmt: skip
        plain(0.0, softmax_scale, causal, -1, -1)
        assert return_lse
        return varlen_forward(
            q, k, v, bounds(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        )

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, cu_seqlens_q=None,
        cu_seqlens_k=None, deterministic=False,
    ):  # fmt: skip
        plain(0.0, softmax_scale, causal, -1, -1)
        ragged = bounds(cu_seqlens_q, cu_seqlens_k, 99, 99)
        return varlen_backward(dout, q, k, v, out, lse, ragged)


FLASH3_FORWARD = (
    "fwd(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? v_new=None, Tensor? q_v=None, "
    "Tensor? out=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    "Tensor? cu_seqlens_k_new=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, Tensor? page_table=None, "
    "float? softmax_scale=None, bool is_causal=False, int window_size_left=-1, "
    "int window_size_right=-1, int num_splits=0) -> (Tensor, Tensor, Tensor, Tensor)"
)
FLASH3_BACKWARD = (
    "bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse, "
    "Tensor(a!)? dq=None, Tensor(b!)? dk=None, Tensor(c!)? dv=None, Tensor? cu_seqlens_q=None, "
    "Tensor? cu_seqlens_k=None, Tensor? seqused_q=None, Tensor? seqused_k=None, "
    "int? max_seqlen_q=None, int? max_seqlen_k=None, float? softmax_scale=None, "
    "bool is_causal=False, int window_size_left=-1, int window_size_right=-1, float softcap=0.0, "
    "bool deterministic=False, int sm_margin=0) -> Tensor"
)


def flash3_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
    named = dict(zip(_names(FLASH3_FORWARD)[3:], rest, strict=False)) | options
    plain(0.0, named["softmax_scale"], named.get("is_causal", False), -1, -1)
    out, lse = varlen_forward(q, k, v, _flash3_bounds(named))
    return out, lse, q.new_empty(0), q.new_empty(0)


def flash3_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, *rest: Any, **more: Any
) -> Tensor:
    named = dict(zip(_names(FLASH3_BACKWARD)[6:], rest, strict=False)) | more
    plain(0.0, named["softmax_scale"], named.get("is_causal", False), -1, -1)
    grads = varlen_backward(dout, q, k, v, out, lse, _flash3_bounds(named))
    write((named["dq"], named["dk"], named["dv"]), grads)
    return q.new_empty(0)


def _flash3_bounds(named: dict[str, Any]) -> Ragged | None:
    keys = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return bounds(*(named.get(key) for key in keys))


def _names(schema: str) -> list[str]:
    return [a.name for a in torch._C.parse_schema(f"flash_attn_3::{schema}").arguments]


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    library = torch.library.Library("flash_attn_3", "DEF")
    library.define(FLASH3_FORWARD)
    library.define(FLASH3_BACKWARD)
    library.impl("fwd", flash3_fwd, "CPU")
    library.impl("bwd", flash3_bwd, "CPU")
    modules = {"flash2": Flash2, "flash3": SimpleNamespace(), "flash4": Flash4}
    monkeypatch.setattr(flash_attn, "_load", modules.__getitem__)
    flash_attn._flash4_bounds_unused.cache_clear()
    yield
    flash_attn._flash4_bounds_unused.cache_clear()
    library._destroy()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["flash2", "flash3", "flash4"])
def test_a_package_is_called_as_it_wants(packages: None, name: str, masked: bool) -> None:
    q, k, v, grad = (torch.randn(2, rows, 3, WIDTH) for rows in (6, 9, 9, 6))
    mask = None
    if masked:
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[0, 5:] = False
    wanted, wanted_lse = attend_with(CPU, q, k, v, mask)
    out, lse = attend_with(BACKENDS[name], q, k, v, mask)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    merged = wanted_lse + 0.5  # over further keys
    found = attend_backward_with(BACKENDS[name], grad, q, k, v, mask, wanted, merged)
    expected = attend_backward_with(CPU, grad, q, k, v, mask, wanted, merged)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("name", "package"),
    [("flash2", "flash-attn"), ("flash3", "flash-attn-3"), ("flash4", "flash-attn-4")],
)
def test_a_package_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    def absent(module: str) -> Any:
        raise ModuleNotFoundError(name=module.partition(".")[0])

    monkeypatch.setattr(flash_attn, "import_module", absent)
    monkeypatch.setattr(flash_attn, "_load", flash_attn._load.__wrapped__)
    q = torch.randn(1, 4, 2, WIDTH)
    assert BACKENDS[name].refuses(q, q, False) == f"the package {package} is not installed"


def test_a_package_that_cannot_be_imported_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> Any:
        raise ImportError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(flash_attn, "import_module", broken)
    reason = flash_attn._load.__wrapped__("flash2")
    assert reason == ("the package flash-attn cannot be imported (undefined symbol: _ZN3c10)")

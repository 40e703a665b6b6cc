"""What all ops share: their registration, the choice between kernel and reference, traffic."""

import importlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hunyuan_kernels as ops
from hunyuan_kernels import dispatch
from hunyuan_kernels.testing import bytes_moved


def small(requires_grad=True, device="cpu"):
    torch.manual_seed(0)

    def noise(*shape):
        return torch.randn(*shape, device=device).requires_grad_(requires_grad)

    heads, weight, table = (1, 3, 2, 8), noise(8), torch.randn(3, 4, device=device)
    return {
        "norm_modulate": (noise(2, 3, 16), noise(2, 16), noise(2, 16), 1e-6),
        "gated_residual": (noise(2, 3, 16), noise(2, 16), noise(2, 3, 16)),
        "qk_norm_rope": (noise(*heads), noise(*heads), weight, weight, table, table, 1e-6),
        "gelu_linear2": (noise(2, 3, 8), noise(2, 3, 16), noise(8, 24), noise(8)),
    }


@pytest.fixture(autouse=True)
def _usual_choice():
    yield
    dispatch.set_mode("auto")
    for op in dispatch.OPS:
        dispatch.set_enabled(op, None)


@pytest.mark.kernel
@pytest.mark.parametrize("op", list(small()))
def test_registration_is_sound(op):
    custom = getattr(torch.ops.hunyuan_kernels, op).default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(custom, small()[op], test_utils=checks)


@pytest.mark.kernel
def test_the_merge_declares_what_it_changes():
    out, lse = torch.randn(1, 3, 2, 8), torch.randn(1, 2, 3)
    custom = torch.ops.hunyuan_kernels.lse_merge.default
    torch.library.opcheck(
        custom, (out, lse, out.clone(), lse.clone()), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.kernel
@pytest.mark.parametrize("op", list(small()))
def test_gradients_of_a_trace_have_the_shapes_of_the_inputs(op):
    with FakeTensorMode(), dispatch.also_on("cpu"):
        args = small()[op]
        results = getattr(ops, op)(*args)
        results = results if isinstance(results, tuple) else (results,)
        sum(r.float().sum() for r in results).backward()
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.requires_grad:
                assert arg.grad is not None
                assert arg.grad.shape == arg.shape


@pytest.mark.kernel
def test_every_op_is_listed_and_documented():
    assert set(dispatch.OPS) == set(ops.__all__)
    for op in dispatch.OPS:
        folder = importlib.import_module(f"hunyuan_kernels.ops.{op}").__path__[0]
        with open(f"{folder}/README.md") as readme:
            assert f"# {op}" in readme.read()


def test_a_cpu_tensor_takes_the_reference():
    assert not any(dispatch.enabled(op, torch.zeros(1, 2, 64)) for op in dispatch.OPS)


def test_choice_by_device_dtype_and_width():
    with dispatch.also_on("cpu"):
        assert all(dispatch.enabled(op, torch.zeros(1, 2, 64)) for op in dispatch.OPS)
        assert not dispatch.enabled("norm_modulate", torch.zeros(1, 2, 64, dtype=torch.float64))
        assert not dispatch.enabled("norm_modulate", torch.zeros(1, 1, 20_000))
        assert not dispatch.enabled("norm_modulate", torch.zeros(1, 0, 64))
        assert dispatch.enabled("adamw_ema", torch.zeros(20_000))


def test_choice_by_mode_and_switch(monkeypatch):
    x = torch.zeros(1, 2, 64)
    monkeypatch.setitem(dispatch._PAYS, "lse_merge", False)
    with dispatch.also_on("cpu"):
        assert not dispatch.enabled("lse_merge", x)
        dispatch.set_mode("on")
        assert dispatch.enabled("lse_merge", x)
        dispatch.set_enabled("lse_merge", False)
        assert not dispatch.enabled("lse_merge", x)
        assert dispatch.enabled("norm_modulate", x)
        dispatch.set_mode("auto")
        dispatch.set_enabled("lse_merge", True)
        assert dispatch.enabled("lse_merge", x)
        dispatch.set_mode("off")
        assert not any(dispatch.enabled(op, x) for op in dispatch.OPS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="auto, on or off"):
        dispatch.set_mode("maybe")
    with pytest.raises(ValueError, match="norm_modulate"):
        dispatch.set_enabled("norm", True)
    with pytest.raises(ValueError, match="norm_modulate"):
        bytes_moved("norm", {})


def test_traffic_of_the_large_model():
    shapes = {"B": 1, "S": 119_056, "D": 3072, "A": 24, "E": 128, "M": 12_288, "N": 1_000}
    one = 119_056 * 3072 * 2
    for op in dispatch.OPS:
        traffic = bytes_moved(op, shapes, 4 if op == "adamw_ema" else 2)
        assert traffic.fused.moved < traffic.eager.moved, op
        assert traffic.fused.kept <= traffic.eager.kept
    linear = bytes_moved("gelu_linear2", shapes)
    assert linear.eager.kept - linear.fused.kept == 5 * one
    assert bytes_moved("norm_modulate", shapes | {"B": 2}).eager.kept == 4 * one
    assert bytes_moved("adamw_ema", shapes, 4).fused.forward == 36_000

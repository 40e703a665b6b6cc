"""The released float8 form: weights of the blocks' linears with one scale each in another file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hunyuan_train.checkpoint.tensor_files import open_source
from hunyuan_train.cli.convert import main
from hunyuan_train.models.hunyuan.config import HunyuanConfig
from hunyuan_train.models.hunyuan.model import HunyuanVideo

SIZES = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_double_blocks": 1,
    "num_single_blocks": 2,
    "rope_axes": [4, 6, 6],
    "text_dim": 10,
    "pooled_dim": 6,
    "refiner_depth": 1,
}
LARGEST = 448.0
"""Largest value of float8_e4m3fn."""
LINEAR = "single_blocks.1.linear1"
NAME = "mp_rank_00_model_states"


@pytest.fixture(scope="module")
def model() -> HunyuanVideo:
    torch.manual_seed(0)
    model = HunyuanVideo(HunyuanConfig(**SIZES))
    for param in model.parameters():
        nn.init.normal_(param, std=0.05)
    return model.bfloat16()


@pytest.fixture(scope="module")
def quantised(model) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State and scales: a weight's largest value becomes the largest of its type."""
    state, scales = dict(model.state_dict()), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("double_blocks" in name or "single_blocks" in name):
            weight = module.weight.detach().float()
            scales[name] = weight.abs().max() / LARGEST
            state[f"{name}.weight"] = (weight / scales[name]).to(torch.float8_e4m3fn)
    assert len(scales) == 10 + 2 * 3
    return state, scales


def write(folder: Path, state: dict, scales: dict | None) -> Path:
    folder.mkdir()
    torch.save({"module": state}, folder / f"{NAME}_fp8.pt")
    if scales is not None:
        torch.save(scales, folder / f"{NAME}_fp8_map.pt")
    return folder


def run(path: Path, output: Path, *extra: str) -> dict[str, Tensor]:
    arguments = ["from=official", "to=ours", "model=transformer", f"input={path}"]
    assert main([*arguments, f"output={output}", "model.rope_axes=[4,6,6]", *extra]) == 0
    return load_file(output / "model.safetensors")


def test_values_are_multiplied_by_their_scales(model, quantised, tmp_path):
    state, scales = quantised
    folder = write(tmp_path / "in", state, scales)
    exact = run(folder, tmp_path / "float32", "dtype=float32")
    kept = run(folder, tmp_path / "kept")
    assert exact.keys() == kept.keys() == state.keys()
    for name, original in model.state_dict().items():
        assert (exact[name].dtype, kept[name].dtype) == (torch.float32, torch.bfloat16)
        module = name.removesuffix(".weight")
        if module not in scales:
            assert torch.equal(exact[name], original.float())
            assert torch.equal(kept[name], original)
            continue
        product = state[name].float() * scales[module]
        assert torch.equal(exact[name], product)
        assert torch.equal(kept[name], product.bfloat16())
        # Three bits after the point: half a step is 1/16 of the value, below 2^-6 it is 2^-10.
        error = (exact[name] - original.float()).abs()
        assert (error <= original.float().abs() / 16 + scales[module] * 2**-10).all()
        assert error.max() > 0


@pytest.mark.parametrize("kind", ["bfloat16 of shape [1]", "plain number", "saver's prefix"])
def test_other_ways_to_store_the_same(kind, quantised, tmp_path):
    state, scales = quantised
    stored: dict = scales
    if kind == "bfloat16 of shape [1]":
        stored = {k: v.bfloat16().reshape(1) for k, v in scales.items()}
    elif kind == "plain number":
        stored = {k: float(v) for k, v in scales.items()}
    else:
        state = {f"module.{k}": v for k, v in state.items()}
    found = run(write(tmp_path / "in", state, stored), tmp_path / "out", "dtype=float32")
    product = quantised[0][f"{LINEAR}.weight"].float() * float(stored[LINEAR])
    assert torch.equal(found[f"{LINEAR}.weight"], product)


def test_bfloat16_is_preferred_and_float8_can_be_named(model, quantised, tmp_path):
    folder = write(tmp_path / "in", *quantised)
    torch.save({"module": model.state_dict()}, folder / f"{NAME}.pt")
    found = run(folder, tmp_path / "folder")
    assert torch.equal(found[f"{LINEAR}.weight"], model.state_dict()[f"{LINEAR}.weight"])
    named = run(folder / f"{NAME}_fp8.pt", tmp_path / "named")
    product = quantised[0][f"{LINEAR}.weight"].float() * quantised[1][LINEAR]
    assert torch.equal(named[f"{LINEAR}.weight"], product.bfloat16())


def test_a_stage_that_starts_from_them_gets_products(quantised, tmp_path):
    """``stage.init_from`` and the teacher read weights by this function."""
    source = open_source(write(tmp_path / "in", *quantised), ema=False)
    assert all(info.dtype == torch.bfloat16 for info in source.infos.values())
    product = quantised[0][f"{LINEAR}.weight"].float() * quantised[1][LINEAR]
    assert torch.equal(source.read(f"{LINEAR}.weight"), product.bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, rf"stored as float8 and its scale should be in {NAME}_fp8_map\.pt beside it, which"),
        ({LINEAR: "gone"}, rf"lacks {LINEAR}, the scale of the float8 weights {LINEAR}\.weight"),
        ({LINEAR: torch.zeros(())}, rf"{LINEAR} is 0\.0, expected one positive number"),
        ({LINEAR: torch.ones(3)}, rf"{LINEAR} is \[3\], expected one positive number"),
        ({LINEAR: float("nan")}, rf"{LINEAR} is nan, expected one positive number"),
    ],
)
def test_scales_that_are_missing_or_no_scales(change, message, quantised, tmp_path):
    state, scales = quantised
    stored = None if change is None else {**scales, **change}
    if change == {LINEAR: "gone"}:
        del stored[LINEAR]
    folder = write(tmp_path / "in", state, stored)
    with pytest.raises(ValueError, match=message) as error:
        run(folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()

"""Layouts as users run them: train under one, go on under another, sample under a third."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import make_data, overrides, rows, run_verb

from hunyuan_train.checkpoint.load import load_weights
from hunyuan_train.evaluation.video import read_video

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS, HALF = 6, 3
# Two micro-batches an update, whoever takes them.
ONE = ["stage.micro_steps=2", "data.max_tokens=64"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, to compare with."""
    run = tmp_path_factory.mktemp("straight")
    done = run_verb("train", overrides(data, run, *ONE, f"stage.steps={STEPS}"))
    assert done.returncode == 0, done.stderr
    return run


RELAYS = {
    "tp2+sp, then ring2": (["tp=2", "sp=true"], ["cp_ring=2"]),
    "ulysses2, then one process": (["cp_ulysses=2"], []),
    "deepspeed2 on tp2, then zero3 on ring2": (
        ["zero_engine=deepspeed", "zero_stage=2", "tp=2"],
        ["cp_ring=2", "zero_stage=3"],
    ),
    "zero3 on ring2, then deepspeed3 on ring2": (
        ["cp_ring=2"],
        ["cp_ring=2", "zero_engine=deepspeed", "zero_stage=3"],
    ),
}


FIRST = {"ulysses2, then one process", "deepspeed2 on tp2, then zero3 on ring2"}


@pytest.mark.parametrize(
    "relay", [pytest.param(r, marks=[] if r in FIRST else [pytest.mark.again]) for r in RELAYS]
)
def test_a_run_goes_on_under_another_layout(
    data: Path, straight: Path, tmp_path: Path, relay: str
) -> None:
    for steps, fields in zip((HALF, STEPS), RELAYS[relay], strict=True):
        layout = [f"parallel.{field}" for field in fields]
        # The schedule is constant after the warm-up, so a shorter stage is a part of the longer.
        arguments = overrides(data, tmp_path, *ONE, f"stage.steps={steps}", *layout)
        done = run_verb("train", [*arguments, "run.accept_changes=true"], 2 if fields else 1)
        assert done.returncode == 0, done.stderr
    left, right = rows(straight), rows(tmp_path)
    assert [row["step"] for row in right] == list(range(1, STEPS + 1))
    for one, two in zip(left, right, strict=True):
        for key in ("loss", "grad_norm", "lr"):
            assert two[key] == pytest.approx(one[key], rel=1e-4), (key, one["step"])
        assert (two["tokens"], two["samples"]) == (one["tokens"], one["samples"])
    for which in ("model", "ema"):
        one, two = load_weights(straight, which), load_weights(tmp_path, which)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-4, msg=name)


def test_sampling_is_the_same_under_any_layout(data: Path, straight: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts").write_text("a red circle moving left\na blue bar\n")
    # Videos of several tiles: ranks that work on one share them.
    vae = Path(shutil.copytree(data / "vae", tmp_path / "vae"))
    fields = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**fields, "tile_size_px": 64}))
    sheets, means = {}, {}
    for name, ranks, fields in (
        ("one", 1, []),
        ("tp2 x ring2", 4, ["tp=2", "sp=true", "cp_ring=2"]),
        ("ulysses2, two groups", 4, ["cp_ulysses=2"]),
    ):
        out = tmp_path / name.replace(" ", "-")
        done = run_verb(
            "sample",
            [
                f"run.dir={straight}",
                f"run.vae={vae}",
                f"sample.prompts_file={tmp_path / 'prompts'}",
                f"sample.output={out}",
                "sample.frames=5",
                "sample.height=64",
                "sample.width=96",
                "sample.steps=2",
                "sample.num_per_prompt=2",
                *(f"parallel.{field}" for field in fields),
            ],
            ranks,
        )
        assert done.returncode == 0, done.stderr
        assert len(json.loads((out / "prompts.json").read_text())) == 2
        with Image.open(out / "contact_sheet.png") as sheet:
            sheets[name] = np.asarray(sheet.convert("RGB"), dtype=np.int16)
        videos = [read_video(file) for file in sorted(out.glob("*.mp4"))]
        assert [video.shape for video in videos] == [(3, 5, 64, 96)] * 4
        means[name] = torch.stack([video.mean() for video in videos])
    for name in sheets:
        # The sheet is lossless: rounding may move a value by a step. The codec's choices hang on
        # such steps, so of what it wrote only the means are compared.
        assert np.abs(sheets[name] - sheets["one"]).max() <= 1, name
        torch.testing.assert_close(means[name], means["one"], rtol=0, atol=2e-3)


def test_a_layout_that_does_not_fit_the_ranks_is_one_sentence(data: Path, tmp_path: Path) -> None:
    arguments = overrides(data, tmp_path / "run", "parallel.tp=4")
    done = run_verb("train", arguments, 2)
    assert done.returncode != 0
    assert (
        "parallel: tp=4 is 4, which does not divide the world size 2; choose parallel.tp in 1 2"
        in done.stderr
    )
    arguments = overrides(data, tmp_path / "heads", "parallel.cp_ulysses=2", "model.num_heads=1",
                          "model.rope_axes=[8,12,12]")  # fmt: skip
    done = run_verb("train", arguments, 2)
    assert "does not divide model.num_heads=1; choose a product from 1" in done.stderr


@pytest.mark.again
def test_a_sequence_that_is_too_short_for_its_ranks_is_one_sentence(
    data: Path, tmp_path: Path
) -> None:
    arguments = overrides(data, tmp_path / "few", "parallel.cp_ring=16", "certify.at_start=false")
    done = run_verb("train", arguments, 16)
    assert "cuts a sequence into 16, but bucket " in done.stderr

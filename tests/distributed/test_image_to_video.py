"""Image to video as users run it: frames encoded alone, trained, killed, resumed, sampled."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_run import make_data, overrides, rows

from hunyuan_train.checkpoint.load import load_weights
from hunyuan_train.cli.main import main
from hunyuan_train.data.shapes import write_shapes_dataset

pytestmark = [pytest.mark.dist]

REPLACE = ["model.image_condition=token_replace"]
CONCAT = ["model.image_condition=concat", "model.in_channels=33"]
TASKS = "objective.tasks={text:1,first:2,first_last:1}"
FRAMES = "data.condition_frames=[first,last]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def stills(data: Path) -> list[str]:
    """The overrides that use a store whose clips have their frames encoded alone too."""
    clips = write_shapes_dataset(data / "longer", 8, 4, 0, [(64, 64)], [9])
    store = [f"data.latents={data / 'stills'}", "data.anchors=[64]", "data.durations=[1,9]"]
    arguments = [*overrides(data, data / "run"), f"data.source={clips}", FRAMES, *store]
    assert main(["precompute", *arguments]) == 0
    return store


def test_a_store_without_the_frames_is_refused_before_training(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert main(["train", *overrides(data, tmp_path, *REPLACE, TASKS)]) != 0
    shown = capfd.readouterr().err
    assert "precompute again with data.condition_frames=[first,last]" in shown
    assert "Traceback" not in shown


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(REPLACE, id="token_replace"),
        pytest.param(CONCAT, id="concat", marks=pytest.mark.again),
    ],
)
def test_trained_in_two_parts_is_bitwise_one_and_is_sampled(
    data: Path, stills: list[str], tmp_path: Path, form: list[str]
):
    run = tmp_path / "run"
    arguments = overrides(data, run, *stills, *form, TASKS, "checkpoint.every_steps=3")
    assert main(["train", *arguments]) == 0
    straight, losses = load_weights(run, "model"), [row["loss"] for row in rows(run)]
    shutil.rmtree(run / "checkpoints" / "step-00000006")
    assert main(["train", *arguments]) == 0
    assert [row["loss"] for row in rows(run)] == losses
    assert len(losses) == 6
    again = load_weights(run, "model")
    assert all(torch.equal(straight[name], again[name]) for name in straight)

    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "first.png")
    listed = tmp_path / "list.jsonl"
    row = {"prompt": "a red circle", "image": "first.png"}
    listed.write_text("\n".join(json.dumps(r) for r in (row, {"prompt": "a blue square"})))
    size = ["sample.frames=9", "sample.height=64", "sample.width=64", "sample.steps=2"]
    arguments = [f"run.dir={run}", *size, f"sample.prompts_file={listed}"]
    assert main(["sample", *arguments]) == 0
    names = sorted(path.name for path in (run / "samples").iterdir())
    assert names == ["000-0.mp4", "001-0.mp4", "contact_sheet.png", "prompts.json"]

"""The verbs as users start them: a curriculum, samples and report, and what bad input prints."""

import json
from pathlib import Path

import pytest
import torch
from tiny_run import MODEL, make_data, overrides, rows, run_command

from hunyuan_train.checkpoint.load import load_weights
from hunyuan_train.cli.main import main

pytestmark = [pytest.mark.dist]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def curriculum(data: Path, run: Path, *extra: str) -> list[str]:
    return overrides(
        data,
        run,
        "curriculum.stages={demo_image:{},demo_video_short:{after:demo_image}}",
        "data.train_anchors=[64]",
        *extra,
    )


@pytest.mark.slow
def test_curriculum_samples_and_report_on_two_ranks(data: Path, tmp_path: Path) -> None:
    arguments = curriculum(data, tmp_path)
    first = run_command("curriculum", arguments, ranks=2)
    assert first.returncode == 0, first.stderr
    stages = sorted((tmp_path / "stages").iterdir())
    assert [stage.name for stage in stages] == ["01-demo_image", "02-demo_video_short"]
    assert len(rows(stages[0])) == len(rows(stages[1])) == 6

    before = (stages[1] / "metrics.jsonl").read_bytes()
    again = run_command("curriculum", arguments, ranks=2)
    assert again.returncode == 0, again.stderr
    assert (stages[1] / "metrics.jsonl").read_bytes() == before, "finished stages ran again"

    size = ["sample.frames=5", "sample.height=64", "sample.width=64", "sample.steps=2"]
    prompts = ['sample.prompts=["a red circle", "a blue square"]']
    sampled = run_command("sample", [f"run.dir={tmp_path}", *size, *prompts], ranks=2)
    assert sampled.returncode == 0, sampled.stderr
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["000-0.mp4", "001-0.mp4", "contact_sheet.png", "prompts.json"]

    assert main(["report", f"run.dir={tmp_path}"]) == 0
    figures = json.loads((tmp_path / "report.json").read_text())
    assert [stage["steps"] for stage in figures["stages"]] == [6, 6]
    assert "a blue square" in (tmp_path / "report.html").read_text()


def test_second_stage_starts_from_the_weights_of_the_first(data: Path, tmp_path: Path) -> None:
    frozen = ["optimizer.lr=1e-12", "optimizer.weight_decay=0"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main(["train", *overrides(data, one)]) == 0
    assert main(["train", *overrides(data, two, f"stage.init_from={one}", *frozen)]) == 0
    assert rows(two)[0]["loss"] < rows(one)[0]["loss"], "the second stage began from scratch"


def test_training_starts_from_converted_weights(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, weights = tmp_path / "run", tmp_path / "weights"
    assert main(["train", *overrides(data, run)]) == 0
    paths = [f"input={run}", f"output={weights}", "ema=true"]
    assert main(["convert", "from=ours", "to=ours", "model=tiny", *MODEL, *paths]) == 0
    fresh = overrides(data, tmp_path / "new", f"stage.init_from={weights}", "stage.steps=3")
    assert main(["train", *fresh, "optimizer.lr=1e-12", "optimizer.weight_decay=0"]) == 0
    trained, started = load_weights(run, "ema"), load_weights(tmp_path / "new", "model")
    for name, tensor in trained.items():
        torch.testing.assert_close(started[name], tensor, rtol=0, atol=1e-6, msg=name)
    wider = ["model.num_single_blocks=3", f"stage.init_from={weights}"]
    assert main(["train", *overrides(data, tmp_path / "wider", *wider)]) == 2
    assert "lacks the tensor single_blocks.2" in capsys.readouterr().err


def test_saved_run_refuses_another_config_and_another_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", *overrides(data, run)]) == 0
    assert main(["train", *overrides(data, run, "optimizer.lr=0.5")]) == 2
    said = capsys.readouterr().err
    assert "is the config of another run" in said
    assert "optimizer.lr: 0.001 -> 0.5" in said
    wider = ["model.num_single_blocks=3", "run.accept_changes=true", "stage.steps=9"]
    assert main(["train", *overrides(data, run, *wider)]) == 2
    said = capsys.readouterr().err
    assert "num_single_blocks" in said
    assert (
        main(["train", *overrides(data, tmp_path / "new", f"stage.init_from={run}", *wider)]) == 2
    )
    assert "num_single_blocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "extra", "message"),
    [
        ("train", ["data.latents=nowhere"], "nowhere"),
        ("train", ["data.latents="], "data.latents is empty; give it the folder"),
        ("train", ["data.train_durations=[17]"], "no usable sample: data.train_anchors"),
        ("train", ["model.text_dim=32", "text.text_dim=32"], "have text_dim=64; precompute again"),
        (
            "train",
            ["parallel.dp_replicate=3"],
            "does not divide the world size 1; choose parallel.dp_replicate in 1",
        ),
        ("train", ["stage.init_from=nowhere"], "nowhere holds no checkpoint"),
        ("precompute", ["run.vae="], "run.vae is empty"),
        ("precompute", ["run.vae=nowhere"], "config.json does not exist; a VAE folder holds"),
        ("curriculum", [], "curriculum.stages is empty; name a curriculum"),
        ("sample", [], "is not the folder of a run"),
        ("fly", [], "fly"),
    ],
)
def test_bad_input_ends_in_one_sentence(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    verb: str,
    extra: list[str],
    message: str,
) -> None:
    assert main([verb, *overrides(data, tmp_path / "run", *extra)]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said

"""Evaluation inside a run: it measures, shows, comes back after a restart, and changes nothing."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import make_data, overrides, rows

from hunyuan_train.checkpoint.load import find_checkpoint, load_weights, read_manifest
from hunyuan_train.cli.main import main
from hunyuan_train.engine.evaluation_notes import EvaluationNotes

SIZE = ("sample.frames=5", "sample.height=64", "sample.width=64", "sample.steps=2")
FAST = ("evaluation.sample_every=4", "optimizer.lr=1e-2", "optimizer.schedule=constant")
PROMPTS = 'evaluation.prompts=["a red circle", "a blue square", "a green star"]'


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def evaluated(data: Path, run: Path, *extra: str) -> list[str]:
    fields = (f"evaluation.latents={data / 'latents'}", "evaluation.every_steps=2", *SIZE, PROMPTS)
    return overrides(data, run, *fields, "evaluation.samples_per_bucket=2", *extra)


def losses(run: Path) -> list[dict[str, Any]]:
    lines = (run / "evaluation.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def timeless(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("time", "seconds")} for r in losses(run)]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", *evaluated(data, folder, *FAST)]) == 0
    return folder


@pytest.fixture(scope="module")
def plain(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training without any evaluation."""
    folder = tmp_path_factory.mktemp("plain")
    assert main(["train", *overrides(data, folder, *FAST[1:])]) == 0
    return folder


def test_losses_of_every_bucket_and_noise_level_are_written(run: Path) -> None:
    found = losses(run)
    assert [row["step"] for row in found] == [2, 4, 6]
    cells = [name for name in found[0] if name.count("/") == 1 and not name.startswith("ema/")]
    assert len(cells) == 4 * 5  # two frame sizes, as images and as clips, at five levels
    assert {f"ema/{name}" for name in cells} <= found[0].keys()
    first, last = found[0], found[-1]
    assert last["loss"] < first["loss"], "the samples were trained on"
    assert first["q0.1"] != first["q0.9"]
    assert first["ema/loss"] != first["loss"], "both were measured with the same weights"
    kept = read_manifest(find_checkpoint(run)).extra["evaluations"]
    assert kept == [[row["step"], row["ema/loss"]] for row in found]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("evaluation/ema/loss")] == [2, 4, 6]


def test_samples_are_written_and_sent(run: Path) -> None:
    folders = sorted((run / "samples").iterdir())
    assert [folder.name for folder in folders] == ["step-00000004", "step-00000006"]
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == ["000-0.mp4", "001-0.mp4", "002-0.mp4", "contact_sheet.png", "prompts.json"]
    one, two = ((folder / "000-0.mp4").read_bytes() for folder in folders)
    assert one != two, "the weights have moved on"
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert "samples/all" in events.Tags()["images"]
    assert [event.step for event in events.Images("samples/001-0")] == [4, 6]


def test_training_is_the_same_with_and_without(run: Path, plain: Path) -> None:
    for name in ("step", "loss", "grad_norm", "samples"):
        assert [row[name] for row in rows(run)] == [row[name] for row in rows(plain)]
    for which in ("model", "ema"):
        one, two = load_weights(run, which), load_weights(plain, which)
        assert all(torch.equal(one[name], two[name]) for name in one), which


def test_losses_depend_on_weights_alone(data: Path, run: Path, tmp_path: Path) -> None:
    """Two runs with other seeds and another order, from the same weights, which stay."""
    still = ("optimizer.lr=1e-30", "optimizer.weight_decay=0", f"stage.init_from={run}")
    for name, seed in (("one", 1), ("two", 2)):
        arguments = evaluated(data, tmp_path / name, *still, f"run.seed={seed}", "stage.steps=4")
        assert main(["train", *arguments]) == 0
    one, two = timeless(tmp_path / "one"), timeless(tmp_path / "two")
    assert one == two
    assert one[0]["loss"] == one[1]["loss"], "the noise depends on the step"


def test_a_restart_writes_no_row_twice_and_keeps_the_list(
    data: Path, run: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    assert main(["train", *evaluated(data, broken, *FAST, "stage.steps=4")]) == 0
    stale = '{"step": 6, "time": 0, "loss": 9.0}\n{"step": 8, "ti'
    with (broken / "evaluation.jsonl").open("a") as file:
        file.write(stale)
    assert main(["train", *evaluated(data, broken, *FAST, "run.accept_changes=true")]) == 0
    assert timeless(broken) == timeless(run)
    one, two = (read_manifest(find_checkpoint(r)).extra for r in (run, broken))
    assert one["evaluations"] == two["evaluations"]


def test_what_was_missed_between_update_and_evaluation_is_done_after_the_restart(
    data: Path, plain: Path, tmp_path: Path
) -> None:
    """As if it had been killed there; the list of a run that was not is the same."""
    resumed = tmp_path / "resumed"
    shutil.copytree(plain, resumed)
    more = ("stage.steps=7", "run.accept_changes=true", "evaluation.every_steps=3")
    assert main(["train", *evaluated(data, resumed, *FAST[1:], *more)]) == 0
    assert [row["step"] for row in losses(resumed)] == [6, 7]


def test_notes_leave_out_what_ended_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    EvaluationNotes(tmp_path).begin("samples", 8)
    caplog.set_level(logging.WARNING)
    again = EvaluationNotes(tmp_path)
    assert "THE RUN ENDED WHILE EVALUATING (samples after step 8)" in caplog.text
    assert not again.allows("samples", 8)
    assert again.allows("samples", 12)
    assert again.allows("held-out losses", 8)
    again.begin("samples", 12)
    again.finish("samples")
    caplog.clear()
    third = EvaluationNotes(tmp_path)
    assert not caplog.text
    assert not third.allows("samples", 8), "the run may go back and come here again"
    third.begin("samples", 16)
    fourth = EvaluationNotes(tmp_path)
    assert fourth.allows("samples", 20), "one went well in between"
    fourth.begin("samples", 20)
    last = EvaluationNotes(tmp_path)
    assert not last.allows("samples", 24)
    assert last.allows("held-out losses", 24)
    assert "samples are off for the rest of this stage" in caplog.text


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["evaluation.latents=nowhere"], "nowhere"),
        (["evaluation.sample_every=2", "run.vae="], "sample_every=2 needs run.vae"),
        (["evaluation.sample_every=2", "evaluation.prompts_file=none.txt"], "none.txt does not"),
    ],
)
def test_what_is_missing_is_one_sentence(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    assert main(["train", *evaluated(data, tmp_path, *extra)]) == 2
    assert message in capsys.readouterr().err

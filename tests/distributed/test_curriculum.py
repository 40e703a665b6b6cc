"""Curricula as users run them: branches, budgets, what is carried, kills, other world sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Job
from tiny_run import make_data, overrides, rows

from hunyuan_train.checkpoint.load import load_weights
from hunyuan_train.checkpoint.storage import Manifest
from hunyuan_train.cli.main import main

pytestmark = [pytest.mark.dist]

QUICK = ("certify.at_start=false", "checkpoint.asynchronous=false", "data.train_durations=[1,5]")
EVERYTHING = "carry:[weights,ema,optimizer,schedule,loader]"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def curriculum(data: Path, run: Path, nodes: str, *extra: str) -> list[str]:
    """Return the arguments of a curriculum whose stages have no settings of their own."""
    plain = nodes.replace("; ", ",").replace(":{", ":{stage:default,").replace(",}", "}")
    return overrides(data, run, f"curriculum.stages={{{plain}}}", "stage.steps=4", *QUICK, *extra)


TREE = "one:{}; two:{after:one}; side:{after:one,carry:[ema]}"


def ledger(run: Path) -> dict[str, dict[str, Any]]:
    return json.loads((run / "curriculum.json").read_text())["stages"]


def digests(run: Path, stage: str) -> dict[str, str]:
    """Return the digest of every tensor of a finished stage."""
    return Manifest.read(run / ledger(run)[stage]["checkpoint"]).digests


def test_a_stage_that_carries_everything_is_the_same_run_going_on(
    data: Path, tmp_path: Path
) -> None:
    settings = ("optimizer.schedule=cosine", "stage.schedule_steps=8", *QUICK)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(["train", *overrides(data, whole, "stage.steps=8", *settings)]) == 0
    nodes = f"one:{{}}; two:{{after:one,{EVERYTHING}}}"
    assert main(["curriculum", *curriculum(data, run, nodes, *settings[:2])]) == 0
    (last,) = (whole / "checkpoints").glob("step-00000008")
    assert digests(run, "two") == Manifest.read(last).digests
    stages = [run / ledger(run)[name]["folder"] for name in ("one", "two")]
    found = [row for stage in stages for row in rows(stage)]
    keys = ("loss", "grad_norm", "lr")
    assert [[r[k] for k in keys] for r in found] == [[r[k] for k in keys] for r in rows(whole)]


def test_branches_start_from_what_they_name_and_finished_stages_stay(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = curriculum(data, tmp_path, TREE, "optimizer.lr=1e-12", "optimizer.weight_decay=0")
    argv = ["curriculum", *arguments]
    assert main([*argv, "--from", "two"]) == 2
    assert "stage two comes after one, which is not finished" in capsys.readouterr().err
    assert main([*argv, "--until", "one", "run.seed=1"]) == 0
    assert main(argv) == 2
    assert "stage one: run.seed: 1 -> 0" in capsys.readouterr().err
    argv.append("run.seed=1")
    before = (tmp_path / "curriculum.json").read_bytes()
    assert main([*argv, "--until", "one"]) == 0
    assert (tmp_path / "curriculum.json").read_bytes() == before, "a finished stage ran again"
    assert main([*argv, "--from=side"]) == 0
    assert [entry["state"] for entry in ledger(tmp_path).values()] == ["done", "waiting", "done"]
    assert main(argv) == 0
    entries = ledger(tmp_path)
    assert [entry["folder"] for entry in entries.values()] == [
        "stages/01-one", "stages/02-two", "stages/03-side"
    ]  # fmt: skip
    for entry in entries.values():
        assert (entry["state"], entry["steps"], entry["ended_by"]) == ("done", 4, "steps")
        assert entry["samples"] == rows(tmp_path / entry["folder"])[-1]["samples"]
        assert 0 < entry["seconds"] <= entry["ended"] - entry["started"] + 0.1
    one = {which: load_weights(tmp_path / "stages/01-one", which) for which in ("model", "ema")}
    for stage, which in (("02-two", "model"), ("03-side", "ema")):
        started = load_weights(tmp_path / "stages" / stage, "model")
        for name, tensor in one[which].items():
            torch.testing.assert_close(started[name], tensor, rtol=0, atol=1e-8, msg=name)


def test_samples_and_tokens_end_stages(data: Path, tmp_path: Path) -> None:
    nodes = "one:{overrides:['stage.samples=9']}; two:{after:one,overrides:['stage.tokens=150']}"
    arguments = curriculum(data, tmp_path, nodes, "stage.steps=50")
    assert main(["curriculum", *arguments]) == 0
    for name, field, limit in (("one", "samples", 9), ("two", "tokens", 150)):
        entry = ledger(tmp_path)[name]
        last, *earlier = reversed(rows(tmp_path / entry["folder"]))
        assert entry["ended_by"] == field
        assert entry[field] == last[field] >= limit
        assert entry["steps"] == last["step"] < 50
        assert all(row[field] < limit for row in earlier)
    before = (tmp_path / "curriculum.json").read_bytes()
    shutil.copy(tmp_path / "curriculum.json", tmp_path / "kept")
    # As if it had been killed after the last save of a stage and before the entry.
    entries = json.loads(before)
    entries["stages"]["one"] |= {"state": "running", "checkpoint": ""}
    (tmp_path / "curriculum.json").write_text(json.dumps(entries))
    assert main(["curriculum", *arguments]) == 0
    again = ledger(tmp_path)["one"]
    for key in ("checkpoint", "steps", "samples", "tokens", "ended_by"):
        assert again[key] == json.loads(before)["stages"]["one"][key]


def state_of(run: Path, stage: str) -> str:
    return ledger(run)[stage]["state"] if (run / "curriculum.json").is_file() else ""


@pytest.mark.slow
def test_killed_twice_and_on_fewer_ranks_it_ends_as_if_it_never_was(
    data: Path, tmp_path: Path
) -> None:
    """On two ranks, killed inside a stage and between two, bitwise; the last branch on one rank."""
    extra = ("stage.steps=8", "checkpoint.every_steps=4", "optimizer.schedule=cosine")
    straight, broken = tmp_path / "straight", tmp_path / "broken"

    def start(run: Path, *options: str) -> Job:
        arguments = curriculum(data, run, TREE, *extra)
        return Job("curriculum", [*arguments, *options], 2, tmp_path / "log")

    start(straight).wait()
    metrics = broken / "stages/01-one/metrics.jsonl"
    at_six = lambda: metrics.is_file() and '"step": 6' in metrics.read_text()  # noqa: E731
    assert start(broken).kill_when(at_six)
    assert state_of(broken, "one") == "running"
    assert start(broken).kill_when(lambda: state_of(broken, "one") == "done")
    assert state_of(broken, "two") != "done"
    start(broken, "--until", "two").wait()
    for stage in ("one", "two"):
        assert digests(broken, stage) == digests(straight, stage), stage
    assert len(ledger(broken)["one"]["attempts"]) == 2

    # The updates of what comes later stay those planned for the ranks of the first start.
    assert main(["curriculum", *curriculum(data, broken, TREE, *extra)]) == 0
    theirs, mine = ledger(straight)["side"], ledger(broken)["side"]
    for key in ("state", "planned_ranks", "steps", "samples", "tokens"):
        assert mine[key] == theirs[key]
    for left, right in zip(
        rows(straight / theirs["folder"]), rows(broken / mine["folder"]), strict=True
    ):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)

"""A run whose loss jumps goes back, leaves the samples out for good, and goes on."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_distributed
from forked import Job
from tiny_run import make_data, overrides, rows

from hunyuan_train.checkpoint.storage import Manifest, step_folder
from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.store import LatentStore, shard_file
from hunyuan_train.engine.data import build_planner, open_stores
from hunyuan_train.engine.loop import train
from hunyuan_train.engine.reporting import data_tables
from hunyuan_train.resilience.events import read_events
from hunyuan_train.resilience.preemption import Preemption
from hunyuan_train.runtime.dist import init_world

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SETTINGS = [
    "data.train_durations=[5]", "data.global_samples=2", "data.planned_ranks=2",
    "data.verify=false", "resilience.guard=rewind", "checkpoint.every_steps=10",
    "checkpoint.keep_last=0", "certify.at_start=false", "data.workers=1",
]  # fmt: skip
LAST = 50
"""Updates until each of the 100 samples came up once, or nearly so."""


def drawn(arguments: Sequence[str], steps: int) -> list[list[str]]:
    """Return the samples that each update would have if none were bad."""
    cfg = compose_config(list(arguments))
    stores = open_stores(cfg)
    (store,) = stores.values()
    planner = build_planner(cfg, stores, 2, cfg.data.max_tokens)
    plans = [planner.next_step() for _ in range(steps)]
    pairs = [[pair for unit in plan.units for pair in planner.rows(unit)] for plan in plans]
    return [[store.index.row(row).sample_id for row, _ in found] for found in pairs]


def poison(folder: Path, names: set[str]) -> None:
    """Make the latents of samples two thousand times as large."""
    index = LatentStore.open(folder, DataConfig()).index
    for number in range(len(index)):
        row = index.row(number)
        if row.sample_id in names:
            path, blob = folder / shard_file(row.latents.shard), row.latents
            raw = bytearray(path.read_bytes())
            found = np.frombuffer(raw, np.float16, blob.nbytes // 2, blob.offset)
            found[:] = np.clip(found * 2e3, -6e4, 6e4)
            path.write_bytes(raw)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"), 100, 0)


@dataclass(frozen=True)
class Spoilt:
    """A run that meets a poisoned sample."""

    arguments: list[str]
    step: int
    """Between 33 and 39, the first update with one of these samples."""
    samples: list[str]
    """Of that update; the second is poison."""


@pytest.fixture(scope="module")
def spoilt(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Spoilt:
    folder = tmp_path_factory.mktemp("spoilt") / "latents"
    shutil.copytree(data / "latents", folder)
    arguments = overrides(data, Path("unused"), *SETTINGS, f"data.latents={folder}")
    updates = drawn(arguments, 39)
    known = [{name for update in updates[:number] for name in update} for number in range(39)]
    step = next(n + 1 for n in range(32, 39) if known[n].isdisjoint(updates[n]))
    samples = updates[step - 1]
    poison(folder, {samples[1]})
    return Spoilt(arguments, step, samples)


def refusals(run: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run) if event["kind"] == "guard"]


def listed(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def test_poison_is_left_out_for_good_also_after_a_kill_and_on_other_ranks(
    spoilt: Spoilt, tmp_path: Path
) -> None:
    samples = spoilt.samples
    arguments = [*spoilt.arguments, f"run.dir={tmp_path}", f"stage.steps={2 * LAST}"]
    job = Job("train", arguments, 2, tmp_path / "killed")
    assert job.kill_when(lambda: step_folder(tmp_path / "checkpoints", 40).is_dir())
    assert run_distributed(_train_all, 1, [arguments]) == [[""]]
    (event,) = refusals(tmp_path)
    assert (event["action"], event["step"]) == ("rewind", spoilt.step)
    assert (event["source"], event["restored_step"]) == ("disk", 30)
    assert event["samples"] == sorted(samples)
    assert event["num_samples"] == 2
    assert event["loss"] > 1e3
    assert event["norm"] > 0
    # Each rank may list a sample, when it meets it first.
    entries = {entry["sample_id"]: entry for entry in reversed(listed(tmp_path))}
    assert sorted(entries) == sorted(samples)
    for entry in entries.values():
        assert (entry["reason"], entry["step"]) == ("refused", spoilt.step)
        assert entry["replaced_by"] not in ("", *samples)
        assert "is above the limit of" in entry["detail"]
        assert entry["detail"].endswith(f" at step {spoilt.step}")
    found = rows(tmp_path)
    assert [row["step"] for row in found] == list(range(1, 2 * LAST + 1))
    assert [row["samples"] for row in found] == [2 * row["step"] for row in found]
    assert max(row["loss"] for row in found) < 10
    assert [row["excluded_samples"] for row in found] == [0] * 30 + [2] * (2 * LAST - 30)
    assert found[-1]["replaced_samples"] >= 2  # of the second epoch, in the second process
    assert found[-1]["skipped_updates"] == 0
    (table,) = [table for table in data_tables(tmp_path) if "could not use" in table.title]
    assert table.note == "2 left out: 2 refused."


def _train_all(rank: int, world: int, runs: list[list[str]]) -> list[str]:
    """Train one after the other; return what stopped each, or nothing."""
    said = []
    for arguments in runs:
        cfg = compose_config(arguments)
        with Preemption(cfg.resilience) as preemption:
            try:
                train(cfg, init_world("cpu"), preemption)
            except ValueError as error:
                said.append(str(error))
            else:
                said.append("")
    return said


def _state(run: Path, step: int) -> tuple[dict[str, str], dict[str, Any]]:
    """Return digests of all tensors and all counters, without those of refusals."""
    manifest = Manifest.read(step_folder(run / "checkpoints", step))
    for name in ("refused", "furthest"):
        del manifest.extra["guard"][name]
    assert manifest.digests
    return manifest.digests, manifest.extra


def _exclude(run: Path, step: int, samples: Sequence[str], why: str) -> None:
    """Leave a run with one checkpoint that has samples excluded."""
    for name in ("config.yaml", "events.jsonl", "quarantine.jsonl", "metrics.jsonl"):
        (run / name).unlink()
    for folder in (run / "checkpoints").iterdir():
        if folder != step_folder(run / "checkpoints", step):
            shutil.rmtree(folder)
    folder = step_folder(run / "checkpoints", step)
    (folder / "replay.json").unlink()
    manifest = Manifest.read(folder)
    manifest.extra["loader"]["excluded"] = {why: sorted(samples)}
    manifest.write(folder)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.again), 2])
def test_wherever_it_goes_back_to_the_run_is_the_one_that_never_met_the_samples(
    spoilt: Spoilt, tmp_path: Path, world: int
) -> None:
    samples = spoilt.samples
    arguments = [
        *spoilt.arguments,
        f"stage.steps={LAST}",
        f"resilience.snapshot_dir='{tmp_path}/memory{{node}}'",
    ]
    arguments += ["parallel.zero_stage=3"] if world == 2 else []
    runs = {
        "disk": [],
        "memory": ["resilience.snapshot_every=1"],
        "the beginning": ["checkpoint.every_steps=0"],
    }
    said = run_distributed(
        _train_all, world,
        [[*arguments, f"run.dir={tmp_path / name}", *more] for name, more in runs.items()],
    )  # fmt: skip
    assert said == [[""] * 3] * world
    back = {"disk": 30, "memory": spoilt.step - 1, "the beginning": 0}
    for name, step in back.items():
        (event,) = refusals(tmp_path / name)
        assert (event["step"], event["source"]) == (spoilt.step, name)
        assert event["restored_step"] == step
    tensors, counters = _state(tmp_path / "disk", LAST)
    ((why, excluded),) = counters["loader"]["excluded"].items()
    assert excluded == sorted(samples)
    assert counters["samples"] == 2 * LAST
    for name in ("memory", "the beginning"):
        assert _state(tmp_path / name, LAST) == (tensors, counters)
    # The same checkpoint and exclusion, in processes that never went back.
    shutil.copytree(tmp_path / "disk", tmp_path / "again")
    _exclude(tmp_path / "again", 30, samples, why)
    said = run_distributed(_train_all, world, [[*arguments, f"run.dir={tmp_path / 'again'}"]])
    assert said == [[""]] * world
    assert refusals(tmp_path / "again") == []
    assert _state(tmp_path / "again", LAST) == (tensors, counters)


def test_refusals_in_a_row_stop_the_run_in_one_sentence(data: Path, tmp_path: Path) -> None:
    """All samples that come up after update 32 are poison."""
    shutil.copytree(data / "latents", tmp_path / "latents")
    more = [f"run.dir={tmp_path / 'run'}", f"data.latents={tmp_path / 'latents'}"]
    arguments = overrides(data, tmp_path, *SETTINGS, *more, "resilience.max_skipped=3")
    good = {name for update in drawn(arguments, 32) for name in update}
    poison(
        tmp_path / "latents", {name for update in drawn(arguments, 60) for name in update} - good
    )
    ((said,),) = run_distributed(_train_all, 1, [[*arguments, f"stage.steps={LAST}"]])
    assert "3 updates were refused in a row; look at these samples" in said
    assert "\n" not in said
    actions = [event["action"] for event in refusals(tmp_path / "run")]
    assert actions == ["rewind", "rewind", "stop"]

"""The story of a run or a curriculum, from what its folder holds: for the report."""

import json
from collections.abc import Sequence
from pathlib import Path

from hunyuan_train.config.compose import CONFIG_NAME
from hunyuan_train.engine.bucket_meter import FILE_NAME as BUCKETS_NAME
from hunyuan_train.engine.goodput import failures_table, goodput_of
from hunyuan_train.engine.ledger import Ledger
from hunyuan_train.engine.loss_meter import FILE_NAME as LOSSES_NAME
from hunyuan_train.engine.sampling import PROMPTS_NAME
from hunyuan_train.evaluation.bucket_stats import read_bucket_stats
from hunyuan_train.evaluation.loss import FILE_NAME as EVALUATION_NAME
from hunyuan_train.evaluation.report import SampleGrid, Table
from hunyuan_train.evaluation.story import (
    StageSpan,
    data_table,
    held_out_tables,
    loss_table,
    spread,
    stages_table,
)
from hunyuan_train.evaluation.video import read_png, read_video
from hunyuan_train.resilience.goodput import Goodput

_MOST_PROMPTS = 6
_MOST_STEPS = 6


def stage_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of a curriculum's stages by name, in the order they ran; of a run, itself.

    Stages that have not begun are left out.
    """
    records = Ledger.read(folder).stages
    found = {name: folder / record.folder for name, record in records.items()}
    if not found:
        configs = sorted((folder / "stages").glob(f"*/{CONFIG_NAME}"))
        found = {path.parent.name: path.parent for path in configs} or {folder.name: folder}
    if records:
        found = dict(sorted(found.items(), key=lambda item: records[item[0]].started))
    return {name: path for name, path in found.items() if (path / CONFIG_NAME).is_file()}


def opening_tables(folder: Path) -> list[Table]:
    """Return the curriculum over time, the failures it survived, and the data it has seen."""
    account = _account(folder)
    tables = []
    if records := Ledger.read(folder).stages:
        spans = [
            StageSpan(
                name=name,
                after=record.after,
                state=record.state.value,
                ended_by=record.ended_by,
                pieces=[(begin, end) for begin, end in record.attempts],
                steps=record.steps,
                samples=record.samples,
                tokens=record.tokens,
            )
            for name, record in sorted(records.items(), key=lambda item: item[1].started or 1e12)
        ]
        failures = [failed.time for failed in account.failures] if account else []
        tables.append(stages_table(spans, failures))
    if account is not None and (failed := failures_table(account)):
        tables.append(failed)
    stages = stage_folders(folder)
    stats = {name: read_bucket_stats(path / BUCKETS_NAME) for name, path in stages.items()}
    if seen := data_table({name: found for name, found in stats.items() if found}):
        tables.append(seen)
    return tables


def _account(folder: Path) -> Goodput | None:
    try:
        return goodput_of(folder)
    except ValueError:
        return None


def evaluation_tables(folder: Path) -> list[Table]:
    """Return held-out losses, then the training losses by noise level of every stage."""
    stages = stage_folders(folder)
    tables = held_out_tables({name: path / EVALUATION_NAME for name, path in stages.items()})
    found = [loss_table(name, path / LOSSES_NAME) for name, path in stages.items()]
    return tables + [table for table in found if table is not None]


def progress_grids(folder: Path) -> list[SampleGrid]:
    """Return a grid per prompt of the samples that training made, as it went on.

    Of a curriculum the last of each stage, of a run a few that are spread over it. Prompts that
    most of these have in common come first.
    """
    sets: list[tuple[str, Path]] = []
    stages = stage_folders(folder)
    for name, path in stages.items():
        complete = [p.parent for p in sorted((path / "samples").glob(f"step-*/{PROMPTS_NAME}"))]
        chosen = list(spread(complete, _MOST_STEPS if len(stages) == 1 else 1))
        sets += [(f"{name}, update {int(p.name.removeprefix('step-')):,}", p) for p in chosen]
    prompts: dict[str, list[tuple[str, Path]]] = {}
    for label, place in sets:
        for number, prompt in enumerate(json.loads((place / PROMPTS_NAME).read_text())):
            for suffix in ("mp4", "png"):
                if (path := place / f"{number:03d}-0.{suffix}").is_file():
                    prompts.setdefault(str(prompt), []).append((label, path))
    shown = sorted(prompts.items(), key=lambda item: -len(item[1]))[:_MOST_PROMPTS]
    return [_grid(prompt, found) for prompt, found in shown]


def _grid(prompt: str, found: Sequence[tuple[str, Path]]) -> SampleGrid:
    videos = [read_video(path) if path.suffix == ".mp4" else read_png(path) for _, path in found]
    return SampleGrid(
        title=f"As training went on: {prompt}",
        videos=videos,
        captions=[label for label, _ in found],
    )

"""The report of a run folder: its stages' curves, its samples and its settings."""

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hunyuan_train.config.compose import CONFIG_NAME, load_config
from hunyuan_train.config.run import Trains
from hunyuan_train.engine.bucket_meter import FILE_NAME as BUCKETS_NAME
from hunyuan_train.engine.data import QUARANTINE_NAME
from hunyuan_train.engine.goodput import goodput_table
from hunyuan_train.engine.precompute_merge import QUARANTINE
from hunyuan_train.engine.sampling import PROMPTS_NAME, newest_weights
from hunyuan_train.engine.story import (
    evaluation_tables,
    opening_tables,
    progress_grids,
    stage_folders,
)
from hunyuan_train.evaluation.bucket_stats import (
    bucket_table,
    quarantine_table,
    read_bucket_stats,
)
from hunyuan_train.evaluation.report import Report, SampleGrid, StageCurves, Table, write_report
from hunyuan_train.evaluation.video import read_png, read_video

SHOWN_SAMPLES = 32
METRICS_NAME = "metrics.jsonl"
VAE_TERMS = (
    "absolute", "squared", "gradient", "gabor-pyramid", "lpips-alex", "lpips-vgg", "kl",
    "adversarial", "discriminator",
)  # fmt: skip
"""Columns of the metrics of a stage that trains a VAE which are shown as curves."""


def run_stages(folder: Path) -> list[StageCurves]:
    """Return the curves of every trained stage of a run, in order.

    Raises:
        ValueError: if the folder is not a run's or holds no metrics.
    """
    metrics = {name: path / METRICS_NAME for name, path in stage_folders(folder).items()}
    curves = [StageCurves.read(name, path) for name, path in metrics.items() if path.is_file()]
    if not curves:
        raise ValueError(f"{folder} holds no metrics.jsonl; give run.dir the folder of a run")
    return curves


def sample_grid(
    folder: Path, title: str, captions: list[str], note: str = "", limit: int = SHOWN_SAMPLES
) -> SampleGrid:
    """Read the samples that the ``sample`` verb wrote, at most ``limit``, as a grid."""
    files = sorted([*folder.glob("[0-9]*-*.mp4"), *folder.glob("[0-9]*-*.png")])[:limit]
    videos = [read_video(f) if f.suffix == ".mp4" else read_png(f) for f in files]
    names = [captions[int(f.stem.split("-")[0])] for f in files]
    return SampleGrid(title=title, videos=videos, captions=names, note=note)


def term_curves(stages: Mapping[str, Path]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return the terms of the loss of every stage that trains a VAE.

    Args:
        stages: Folders of stages by name.
    """
    found = {}
    for name, path in stages.items():
        file = path / METRICS_NAME
        if not file.is_file() or load_config(path / CONFIG_NAME).stage.trains is not Trains.vae:
            continue
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        names = [key for key in (rows[-1] if rows else {}) if key in VAE_TERMS]
        found[f"{name}: terms of the loss"] = {
            key: [(row["step"], row[key]) for row in rows if key in row] for key in names
        }
    return found


def data_tables(folder: Path) -> list[Table]:
    """Return what each bucket of each stage gave, and what was quarantined before and in training.

    The list of precompute is that of the latent store of the newest stage.
    """
    stages = stage_folders(folder)
    tables = [
        bucket_table(name, stats)
        for name, path in stages.items()
        if (stats := read_bucket_stats(path / BUCKETS_NAME))
    ]
    data = load_config(list(stages.values())[-1] / CONFIG_NAME).data
    stores = [source.latents for source in data.sources.values()] or [data.latents]
    left_out = {
        "Files that precompute left out": [Path(store) / QUARANTINE for store in stores],
        "Samples that training could not use": [path / QUARANTINE_NAME for path in stages.values()],
    }
    found = [quarantine_table(title, paths) for title, paths in left_out.items()]
    return tables + [table for table in found if table is not None]


def machine() -> dict[str, str]:
    """Return what the figures were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device or platform.machine(),
    }


def report_run(folder: Path, samples: Path) -> Path:
    """Write ``report.html`` and ``report.json`` of a run into its folder.

    Args:
        folder: ``run.dir`` of a training run or a curriculum.
        samples: Folder the ``sample`` verb wrote to; left out when it does not exist.

    Raises:
        ValueError: if the folder is not a run's.
    """
    run = newest_weights(folder)
    grids = []
    prompts = samples / PROMPTS_NAME
    if prompts.is_file():
        grids.append(sample_grid(samples, "Samples", json.loads(prompts.read_text())))
    grids += progress_grids(folder)
    figures: Mapping[str, Any] = {"checkpoint": str(run.checkpoint.relative_to(folder))}
    return write_report(
        folder,
        Report(
            title=f"Run {folder.name}",
            figures=figures,
            opening=opening_tables(folder),
            stages=run_stages(folder),
            grids=grids,
            tables=[
                *evaluation_tables(folder),
                *data_tables(folder),
                *([time] if (time := goodput_table(folder)) else []),
            ],
            extra_curves=term_curves(stage_folders(folder)),
            settings=machine(),
        ),
    )

"""The demo: every verb of the system, one after the other, on clips drawn on the spot.

Each part is the command a user would type, run in child processes; what is finished is skipped
when the demo is started again in the same folder.
"""

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.shapes import (
    Combination,
    draw_clip,
    held_out_prompts,
)
from hunyuan_train.engine.demo_stages import every_stage_fields, stage_scores
from hunyuan_train.engine.embedded_data import VAE_RUN, Stopwatch, make_data
from hunyuan_train.engine.reporting import (
    data_tables,
    machine,
    run_stages,
    sample_grid,
    term_curves,
)
from hunyuan_train.engine.story import (
    evaluation_tables,
    opening_tables,
    progress_grids,
    stage_folders,
)
from hunyuan_train.evaluation.prompt_following import chance_scores, score_video, score_videos
from hunyuan_train.evaluation.report import Report, write_report
from hunyuan_train.evaluation.video import read_video
from hunyuan_train.models.vae.state_dict import load_vae
from hunyuan_train.observability.process_memory import PeakTreeMemory
from hunyuan_train.runtime.processes import run_ranks
from hunyuan_train.runtime.seed import keyed_generator

SCORES_NAME = "scores.json"
INTRO = (
    "A small VAE and a small diffusion transformer, trained from nothing on generated clips of "
    "moving shapes. The prompts below combine colour, shape and direction in ways training never "
    "showed; the scores are read from the pixels of the written mp4 files by plain image "
    "measurements."
)


def run_demo(cfg: RunConfig, arguments: Sequence[str]) -> Path:
    """Run the demo and return the path of its HTML report.

    Args:
        cfg: The demo's config.
        arguments: The overrides it was composed from, handed on to every verb.

    Raises:
        ValueError: if a part fails.
    """
    folder, demo = Path(cfg.run.dir), cfg.demo
    folder.mkdir(parents=True, exist_ok=True)
    vae = folder / "vae"
    prompts = held_out_prompts()[: demo.num_prompts]
    prompts_file = folder / "prompts.txt"
    prompts_file.write_text("\n".join(prompts) + "\n")

    def sample(weights: str) -> None:
        output = folder / "samples" / weights
        fields = [f"run.dir={folder}", f"run.vae={vae}", f"sample.prompts_file={prompts_file}"]
        fields += [f"sample.weights={weights}", f"sample.output={output}"]
        run_ranks("sample", fields, demo.ranks)

    watch = Stopwatch(folder / "seconds.json")
    with PeakTreeMemory(os.getpid()) as memory:
        data = make_data(cfg, arguments, watch)
        fields = [*arguments, *data]
        if demo.every_stage:
            fields += every_stage_fields(cfg, fields, prompts, watch)
        watch.run("train the curriculum", lambda: run_ranks("curriculum", fields, demo.ranks))
        watch.run("sample", lambda: sample("ema"))
        watch.run("sample the untrained model", lambda: sample("initial"))
        watch.run("score", lambda: _write_scores(cfg, folder, prompts))
    figures = json.loads((folder / SCORES_NAME).read_text())
    # A second start skips what is finished, and would measure next to nothing.
    figures["peak_gib"] = max(figures.get("peak_gib", 0.0), memory.peak_bytes / 2**30)
    (folder / SCORES_NAME).write_text(json.dumps(figures, indent=2))
    figures["seconds"] = sum(watch.seconds.values())
    figures["seconds_by_part"] = watch.seconds
    return _write_report(cfg, folder, prompts, figures)


def _write_scores(cfg: RunConfig, folder: Path, prompts: list[str]) -> None:
    scores = {
        "prompts": len(prompts),
        "prompt_following": score_samples(folder / "samples" / "ema", prompts),
        "untrained": score_samples(folder / "samples" / "initial", prompts),
        "ceiling": score_ceiling(cfg, folder / "vae", prompts),
        "chance": chance_scores(),
    }
    if cfg.demo.every_stage:
        scores["stages"] = stage_scores(stage_folders(folder))
    (folder / SCORES_NAME).write_text(json.dumps(scores, indent=2))


def score_samples(folder: Path, prompts: list[str]) -> dict[str, float]:
    """Score the written mp4 files of ``prompts``, in order, from their pixels."""
    videos = [read_video(folder / f"{number:03d}-0.mp4") for number in range(len(prompts))]
    return score_videos(videos, prompts)


def score_ceiling(cfg: RunConfig, vae_folder: Path, prompts: list[str]) -> dict[str, float]:
    """Score real clips of the prompts passed through the VAE: the best a perfect model could do."""
    vae = load_vae(vae_folder)
    size = cfg.sample.bucket
    videos: list[Tensor] = []
    for number, prompt in enumerate(prompts):
        generator = keyed_generator(cfg.run.seed, "ceiling", number)
        combo = Combination.parse(prompt)
        clip = draw_clip(combo, size.frames, size.width, size.height, generator)
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1.0
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).mode())
        videos.append(decoded[0].clamp(-1, 1))
    return score_videos(videos, prompts)


def _write_report(
    cfg: RunConfig, folder: Path, prompts: list[str], figures: dict[str, Any]
) -> Path:
    trained = sample_grid(folder / "samples" / "ema", "Samples of held-out prompts", prompts)
    verdicts = [score_video(v, p) for v, p in zip(trained.videos, trained.captions, strict=True)]
    untrained = sample_grid(folder / "samples" / "initial", "Before training", prompts, limit=8)
    report = Report(
        title="Demo: the whole job at tiny scale",
        intro=INTRO,
        figures=figures,
        targets={"colour": 0.90, "shape": 0.70, "direction": 0.85},
        opening=opening_tables(folder),
        stages=run_stages(folder),
        grids=[
            dataclasses.replace(trained, verdicts=verdicts),
            untrained,
            *progress_grids(folder),
            *progress_grids(folder / VAE_RUN),
        ],
        tables=[
            *evaluation_tables(folder),
            *evaluation_tables(folder / VAE_RUN),
            *data_tables(folder),
        ],
        extra_curves=term_curves({"VAE": folder / VAE_RUN}),
        settings=machine(),
        fps=cfg.sample.fps,
    )
    return write_report(folder, report)

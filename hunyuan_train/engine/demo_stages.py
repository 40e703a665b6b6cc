"""What the full demo adds: every stage measured on held-out clips and by its samples.

The samples are those that a run makes of itself after its last update, from the same noise for the
same prompt in every stage. Image stages are asked for still shapes; image-to-video stages get the
first frame of a clip that was never trained on, and are asked to move it.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.shapes import Combination, draw_clip, write_shapes_dataset
from hunyuan_train.engine.curriculum import compose_stages
from hunyuan_train.engine.embedded_data import Stopwatch
from hunyuan_train.engine.sampling import PROMPTS_NAME
from hunyuan_train.evaluation.prompt_following import score_videos
from hunyuan_train.evaluation.video import read_png, read_video, write_png
from hunyuan_train.models.hunyuan.config import ImageCondition
from hunyuan_train.runtime.processes import run_ranks
from hunyuan_train.runtime.seed import keyed_generator

_AFTER_LAST = 1_000_000_000
"""Updates between two sets of samples: there is one, after the last update of a stage."""
_EVERY = 250
"""Updates between two measurements of the held-out loss."""
_HELD_OUT_SEED = 1


def given_clip(cfg: RunConfig, number: int, prompt: str) -> Tensor:
    """Return the real clip of a held-out prompt in the size of ``cfg.sample``, [3, F, H, W]."""
    size = cfg.sample.bucket
    generator = keyed_generator(cfg.run.seed, "given", number)
    combo = Combination.parse(prompt)
    clip = draw_clip(combo, size.frames, size.width, size.height, generator)
    return torch.from_numpy(clip).permute(3, 0, 1, 2).float() / 127.5 - 1.0


def stage_prompts(cfg: RunConfig, stage: RunConfig, prompts: Sequence[str], folder: Path) -> Path:
    """Write what a stage is asked for and return the file: lines, or rows with a first frame."""
    folder.mkdir(parents=True, exist_ok=True)
    if stage.sample.frames == 1:
        path = folder / "stills.txt"
        path.write_text("".join(f"{still(prompt)}\n" for prompt in prompts))
    elif stage.model.image_condition is ImageCondition.none:
        path = folder / "clips.txt"
        path.write_text("".join(f"{prompt}\n" for prompt in prompts))
    else:
        path, rows = folder / f"given-{stage.sample.width}.jsonl", []
        for number, prompt in enumerate(prompts):
            image = folder / f"given-{stage.sample.width}" / f"{number:03d}.png"
            image.parent.mkdir(exist_ok=True)
            write_png(image, given_clip(stage, number, prompt)[:, :1])
            rows.append(json.dumps({"prompt": prompt, "image": str(image.absolute())}) + "\n")
        path.write_text("".join(rows))
    return path


def still(prompt: str) -> str:
    """Return the caption of the same shape at rest."""
    combo = Combination.parse(prompt)
    return Combination(combo.colour, combo.shape).caption


def held_out_latents(cfg: RunConfig, fields: Sequence[str], watch: Stopwatch) -> Path:
    """Draw clips and images that are not trained on, encode them, and return their folder.

    Args:
        cfg: Config of the demo.
        fields: The overrides it was composed from, and those that name its data and VAE.
        watch: What times the parts.
    """
    folder, demo = Path(cfg.run.dir), cfg.demo
    clips, latents = folder / "held-out-clips", folder / "held-out-latents"

    def encode() -> None:
        images = demo.num_held_out // 2
        write_shapes_dataset(clips, demo.num_held_out, images, cfg.run.seed + _HELD_OUT_SEED)
        own = [*fields, f"data.source={clips}", f"data.latents={latents}"]
        run_ranks("precompute", own, demo.ranks)

    watch.run("encode held-out clips", encode)
    return latents


def every_stage_fields(
    cfg: RunConfig, fields: Sequence[str], prompts: Sequence[str], watch: Stopwatch
) -> list[str]:
    """Make held-out clips and prompts; return the overrides that have every stage use them.

    Args:
        cfg: Config of the demo.
        fields: The overrides it was composed from, and those that name its data and VAE.
        prompts: Captions that training never shows.
        watch: What times the parts.
    """
    found = [
        f"evaluation.every_steps={_EVERY}",
        f"evaluation.latents={held_out_latents(cfg, fields, watch)}",
        f"evaluation.sample_every={_AFTER_LAST}",
        "evaluation.prompts=[a]",
    ]
    stages = compose_stages([*fields, *found], cfg)
    for name, stage in stages.items():
        path = stage_prompts(cfg, stage, prompts, Path(cfg.run.dir) / "prompts").absolute()
        own = f"['evaluation.prompts=[]','evaluation.prompts_file={path}']"
        found.append(f"curriculum.stages.{name}.overrides={own}")
    return found


def last_samples(stage: Path) -> list[tuple[str, Path]]:
    """Return prompt and file of each sample that a stage made after its last update.

    Raises:
        ValueError: it made none.
    """
    found = sorted((stage / "samples").glob(f"step-*/{PROMPTS_NAME}"))
    if not found:
        raise ValueError(f"{stage} has no samples; run the demo with recipe=demo_full")
    prompts = json.loads(found[-1].read_text())
    return [
        (prompt, next(found[-1].parent.glob(f"{number:03d}-0.*")))
        for number, prompt in enumerate(prompts)
    ]


def stage_scores(stages: Mapping[str, Path]) -> dict[str, dict[str, float]]:
    """Score the samples that every stage made after its last update.

    Args:
        stages: Folders of the stages by name.

    Returns:
        The share of samples that show their prompt, per stage and aspect, and their mean.
    """
    found = {}
    for name, stage in stages.items():
        samples = last_samples(stage)
        videos = [read_png(f) if f.suffix == ".png" else read_video(f) for _, f in samples]
        scores = score_videos(videos, [prompt for prompt, _ in samples])
        found[name] = scores | {"mean": sum(scores.values()) / len(scores)}
    return found

"""What the stages of the full demo come to, measured on its finished run.

1. Prompt following after every stage, from the samples each made of itself (32 held-out prompts).
2. Guidance distillation: along the sampling paths of the guided teacher, the relative error of the
   student's single pass before and after training; its sampling speed; its prompt following.
3. Image to video: the first frame of each sample against the picture that was given.
4. Schedules: how far 10 steps end from 100, with three spreads of the steps.

    python benchmarks/full_demo.py --run runs/demo-full      (makes the run if it is missing)
"""

import json
import math
import platform
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from _demo import demo_fields, parse
from torch import Tensor, nn

from hunyuan_train.checkpoint.load import find_checkpoint
from hunyuan_train.config.compose import CONFIG_NAME, load_config
from hunyuan_train.config.root import RunConfig
from hunyuan_train.data.shapes import held_out_prompts
from hunyuan_train.encoders.features import TextFeatures
from hunyuan_train.encoders.text import build_text_encoder
from hunyuan_train.engine.demo_stages import given_clip, last_samples, stage_scores
from hunyuan_train.engine.sampling import load_model
from hunyuan_train.engine.story import stage_folders
from hunyuan_train.evaluation.config import Schedule
from hunyuan_train.evaluation.sample import sample_latents
from hunyuan_train.evaluation.schedules import sigma_schedule
from hunyuan_train.evaluation.video import read_video
from hunyuan_train.objectives.conditioning import guidance_input
from hunyuan_train.objectives.distillation import guided_velocity
from hunyuan_train.objectives.flow_matching import model_time
from hunyuan_train.runtime.dist import init_world
from hunyuan_train.runtime.processes import run_ranks
from hunyuan_train.runtime.seed import keyed_normal

TEACHER, STUDENT, GIVEN = "demo_sft", "demo_distill", ("demo_i2v", "demo_portrait")
SCALES = (2.0, 4.0, 6.0, 8.0)
SCALE = 4.0
Figures = dict[str, dict[str, object]]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A stage's averaged weights, and prompts as its model takes them."""

    cfg: RunConfig
    model: nn.Module
    texts: TextFeatures
    empty: TextFeatures
    noise: Tensor
    """[B, C, T, H, W], the same for the same prompts."""


def load(folder: Path, prompts: list[str]) -> Loaded:
    """Load a stage for inference in this process."""
    cfg = load_config(folder / CONFIG_NAME)
    world = init_world("cpu", 600.0)
    encoder = build_text_encoder(cfg.text, world.device)
    media = cfg.sample.bucket.media
    shape = (cfg.vae.latent_channels, *cfg.sample.bucket.latent_shape)
    return Loaded(
        cfg=cfg,
        model=load_model(cfg, find_checkpoint(folder), world).module,
        texts=encoder.encode(prompts, media),
        empty=encoder.encode([""], media).select([0] * len(prompts)),
        noise=torch.stack([keyed_normal(shape, 0, "benchmark", text) for text in prompts]),
    )


@torch.no_grad()
def velocity(
    stage: Loaded, x: Tensor, sigma: Tensor, text: TextFeatures, scale: float | None = None
) -> Tensor:
    """Return one pass of a model at a noise level."""
    guidance = None if scale is None else guidance_input(scale, len(x), x.device)
    time_ = model_time(sigma).expand(len(x))
    return stage.model(x, time_, text.states, text.mask, text.pooled, guidance)


def following(folders: dict[str, Path]) -> Figures:
    """Score the samples of every stage; compare with the stage before in what both are asked."""
    scores = stage_scores(folders)
    stages = json.loads((next(iter(folders.values())).parents[1] / "curriculum.json").read_text())
    before = {name: record["after"] for name, record in stages["stages"].items()}
    drops = {
        name: mean_drop(scores[before[name]], found)
        for name, found in scores.items()
        if before.get(name) in scores
    }
    worst = max(drops, key=lambda name: drops[name])
    figures: Figures = {
        f"prompt following after {name}, %": {
            "value": {aspect: round(100 * share, 1) for aspect, share in found.items()}
        }
        for name, found in scores.items()
    }
    target = {"stage": worst, "target": "<= 5", "holds": drops[worst] <= 0.05}
    value = round(100 * drops[worst], 1)
    return {**figures, "largest drop between two stages, points": {"value": value, **target}}


def mean_drop(then: dict[str, float], now: dict[str, float]) -> float:
    """Return how much lower the mean is over the aspects that both stages are asked for.

    Stills have no direction, so the first stage with motion is compared by colour and shape.
    """
    both = (then.keys() & now.keys()) - {"mean"}
    return sum(then[aspect] - now[aspect] for aspect in both) / len(both)


def distillation(folders: dict[str, Path], prompts: list[str], steps: int) -> Figures:
    """Compare student and guided teacher along the teacher's own paths, and time both."""
    teacher, student = load(folders[TEACHER], prompts), load(folders[STUDENT], prompts)
    sigmas = sigma_schedule(steps, student.cfg.sample.shift)
    x, sums = teacher.noise, dict.fromkeys(("start", "end", "target"), 0.0)
    for now, after in pairwise(sigmas):
        cond = velocity(teacher, x, now, teacher.texts)
        uncond = velocity(teacher, x, now, teacher.empty)
        for w in SCALES:
            target = guided_velocity(cond, uncond, torch.full((len(x),), w))
            predicted = velocity(student, x, now, student.texts, w)
            sums["target"] += float(target.square().sum())
            sums["start"] += float((cond - target).square().sum())  # what the student begins with
            sums["end"] += float((predicted - target).square().sum())
        x = x + (after - now) * guided_velocity(cond, uncond, torch.full((len(x),), SCALE))
    start, end = (math.sqrt(sums[name] / sums["target"]) for name in ("start", "end"))
    scores = stage_scores({name: folders[name] for name in (TEACHER, STUDENT)})
    gap = scores[TEACHER]["mean"] - scores[STUDENT]["mean"]
    faster = speed(teacher, student, steps)
    return {
        "student's relative error at the start": {"value": round(start, 4)},
        "student's relative error": {"value": round(end, 4)},
        "error at the start over error": {
            "value": round(start / end, 2), "target": ">= 5", "holds": start / end >= 5,
        },
        "teacher's following less the student's, points": {
            "value": round(100 * gap, 1), "target": "<= 3", "holds": gap <= 0.03,
        },
        "teacher's sampling time over the student's": {
            "value": round(faster, 2), "target": "1.8 to 2.0", "holds": 1.8 <= faster <= 2.0,
        },
    }  # fmt: skip


def speed(teacher: Loaded, student: Loaded, steps: int) -> float:
    """Return the median ratio of interleaved sampling times, in batches as the demo samples."""

    def one(stage: Loaded, rows: list[int]) -> float:
        guided = stage is teacher
        started = time.perf_counter()
        sample_latents(
            stage.model,
            stage.noise[rows],
            stage.texts.select(rows),
            stage.empty.select(rows) if guided else None,
            steps=steps,
            cfg_scale=SCALE if guided else 1.0,
            guidance=None if guided else SCALE,
        )
        return time.perf_counter() - started

    rows = list(range(min(len(teacher.noise), teacher.cfg.sample.batch_size)))
    ratios = [one(teacher, rows) / one(student, rows) for _ in range(6)]
    return statistics.median(ratios[1:])


def image_to_video(folders: dict[str, Path]) -> Figures:
    """Compare the first frame of each sample with the picture it was given."""
    figures: Figures = {}
    for name in GIVEN:
        cfg = load_config(folders[name] / CONFIG_NAME)
        errors = []
        for number, (prompt, file) in enumerate(last_samples(folders[name])):
            wanted = given_clip(cfg, number, prompt)[:, 0]
            errors.append(float((read_video(file)[:, 0] - wanted).square().mean()))
        # Pixels are from -1 to 1, so the peak is 2.
        psnr = [10 * math.log10(4 / error) for error in errors]
        moves = stage_scores({name: folders[name]})[name]["direction"]
        mean = statistics.mean(psnr)
        figures[f"{name}: PSNR of the first frame, dB"] = {
            "value": round(mean, 1), "lowest": round(min(psnr), 1), "target": ">= 25",
            "holds": mean >= 25,
        }  # fmt: skip
        figures[f"{name}: moves as asked, %"] = {"value": round(100 * moves, 1)}
    return figures


def schedules(folder: Path, prompts: list[str], few: int, many: int) -> Figures:
    """Sample few steps with each schedule, and compare with many steps."""
    stage = load(folder, prompts)
    shift = stage.cfg.sample.shift

    def run(steps: int, schedule: Schedule, shift: float = shift) -> Tensor:
        return sample_latents(
            stage.model, stage.noise, stage.texts, stage.empty, steps=steps, shift=shift,
            cfg_scale=SCALE, schedule=schedule,
        )  # fmt: skip

    # All three tend to the same integral; the mean of three is as near to it as none alone.
    fine = torch.stack([run(many, schedule) for schedule in Schedule]).mean(dim=0)

    def distance(sample: Tensor) -> float:
        return round(float((sample - fine).norm() / fine.norm()), 4)

    found = {schedule: distance(run(few, schedule)) for schedule in Schedule}
    ours = found[Schedule.shifted]
    others = [value for schedule, value in found.items() if schedule is not Schedule.shifted]
    figures: Figures = {
        f"{few} steps, {schedule}: relative distance to {many}": {"value": value}
        for schedule, value in found.items()
    }
    by_shift = {s: distance(run(few, Schedule.shifted, s)) for s in (2.0, 3.0, 5.0, 7.0, 17.0)}
    figures[f"{few} steps, other shifts"] = {"value": by_shift}
    target = {"shift": shift, "target": "< 1", "holds": ours < min(others)}
    ratio = {"value": round(ours / min(others), 3), **target}
    return {**figures, "shifted over the better of the others": ratio}


def main() -> None:
    """Measure and print."""
    options = parse("What the stages of the full demo come to.")
    prompts = held_out_prompts()[: 2 if options.quick else 16]
    with demo_fields(options) as (run, fields):
        run_ranks("demo", fields, 1)  # skips what is done
        folders = stage_folders(run)
        figures = following(folders)
        figures |= distillation(folders, prompts, 2 if options.quick else 16)
        figures |= image_to_video(folders)
        few, many = (2, 4) if options.quick else (10, 100)
        figures |= schedules(folders[TEACHER], prompts, few, many)
    machine = {"device": platform.machine(), "threads": torch.get_num_threads()}
    machine |= {"torch": torch.__version__}
    print(json.dumps({"benchmark": "full_demo", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()

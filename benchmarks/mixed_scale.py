"""Does training at two sizes keep what was learned at the small one, and a plain switch lose it?

A model trained on images of 64 pixels goes on in two ways, for equally many updates: with images of
64 and 96 pixels in every update, and with 96 alone. Both are measured on held-out images of 64
pixels, before and after, at the same noise (the paper's claim for 256 and 512 pixels, arXiv
2412.03603, section 4.4).

    python benchmarks/mixed_scale.py --run runs/demo-full      (its data are used, or made there)
"""

import json
import platform
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from _demo import demo_fields, parse

from hunyuan_train.checkpoint.load import find_checkpoint
from hunyuan_train.config.compose import CONFIG_NAME, compose_config, load_config
from hunyuan_train.engine.build import build_run
from hunyuan_train.engine.demo_stages import held_out_latents
from hunyuan_train.engine.embedded_data import Stopwatch, make_data
from hunyuan_train.engine.held_out import HeldOut, averaged
from hunyuan_train.engine.story import stage_folders
from hunyuan_train.runtime.dist import close_world, init_world
from hunyuan_train.runtime.processes import run_ranks

KEPT, LOST = 0.03, 3.0
"""Largest share that the mixed stage may lose, and how much more the switch has to."""
GRAPH = [
    "curriculum=none",
    "curriculum.stages.low.stage=demo_image",
    "curriculum.stages.mixed.stage=demo_image_mixed",
    "curriculum.stages.mixed.after=low",
    "curriculum.stages.switched.stage=demo_image_mixed",
    "curriculum.stages.switched.after=low",
    "curriculum.stages.switched.overrides=['data.train_anchors=[96]']",
]


def loss_at(stage: Path, latents: Path, anchor: int) -> float:
    """Return the held-out loss of a stage's averaged weights on images of one size."""
    with TemporaryDirectory() as scratch:
        fields = [
            f"run.dir={scratch}",
            f"stage.init_from={find_checkpoint(stage)}",
            "stage.carry=[weights,ema]",
            f"data.train_anchors=[{anchor}]",
            "data.max_tokens=512",
            "evaluation.every_steps=1",
            f"evaluation.latents={latents}",
            "evaluation.samples_per_bucket=12",
        ]
        cfg = load_config(stage / CONFIG_NAME, fields)
        run = build_run(cfg, init_world("cpu", 600.0))
        with averaged(run.state):
            loss = HeldOut(run).measure(run.state, lambda bucket: None).mean
        run.state.loader.close()
        close_world()
    return loss


def train_both(run: Path, fields: list[str]) -> tuple[dict[str, Path], Path]:
    """Train both ways on the data of the demo; return the stages and the held-out latents."""
    cfg = compose_config(fields)
    run.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch(run / "seconds.json")
    data = make_data(cfg, fields, watch)
    latents = held_out_latents(cfg, [*fields, *data], watch)
    folder = run / "mixed-scale"
    own = [*fields, *data, *GRAPH, f"run.dir={folder}", "curriculum.name=mixed_scale"]
    run_ranks("curriculum", own, cfg.demo.ranks)
    return stage_folders(folder), latents


def compare(stages: dict[str, Path], latents: Path) -> dict[str, dict[str, object]]:
    """Measure the held-out loss of all three at both sizes."""
    losses = {name: loss_at(stages[name], latents, 64) for name in ("low", "mixed", "switched")}
    mixed, switched = (losses[name] / losses["low"] - 1 for name in ("mixed", "switched"))
    figures: dict[str, dict[str, object]] = {
        f"held-out loss at 64 px, {name}": {"value": round(loss, 4)}
        for name, loss in losses.items()
    }
    figures["mixed: change at 64 px"] = {
        "value": round(mixed, 4), "target": f"<= {KEPT}", "holds": mixed <= KEPT,
    }  # fmt: skip
    figures["switched: change at 64 px"] = {
        "value": round(switched, 4),
        "target": f">= {LOST:g} x the larger of mixed and {KEPT}",
        "holds": switched >= LOST * max(mixed, KEPT),
    }
    figures["held-out loss at 96 px, mixed, switched"] = {
        "value": [round(loss_at(stages[name], latents, 96), 4) for name in ("mixed", "switched")]
    }
    return figures


def main() -> None:
    """Train both ways, measure and print."""
    with demo_fields(parse("Two sizes in every update against a switch.")) as (run, fields):
        stages, latents = train_both(run, fields)
        figures = compare(stages, latents)
    machine = {"device": platform.machine(), "torch": torch.__version__}
    print(json.dumps({"benchmark": "mixed_scale", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()

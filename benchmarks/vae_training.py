"""A small VAE from nothing: how well it gives back clips it never saw, and what tiles cost it.

Three runs of the ordinary command line, on the embedded shapes and, where there is one, a folder of
real clips beside them: all terms of the loss; the absolute error alone for the same time of
updates; and from the first a phase with tiles switched on and off at random. Finished parts are
kept.

    python benchmarks/vae_training.py --folder runs/vae-bench --steps 1700 --media ../shared/media
"""

import json
import os
import platform
import resource
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.mixture import cells_of
from hunyuan_train.data.pixels import PixelStore
from hunyuan_train.data.shapes import write_shapes_dataset
from hunyuan_train.evaluation.loss import choose_rows
from hunyuan_train.evaluation.reconstruction import ReconstructionScores
from hunyuan_train.models.vae.state_dict import load_vae
from hunyuan_train.objectives.perceptual import build_perceptual
from hunyuan_train.runtime.processes import run_ranks

PSNR_DB, TILED = 28.0, 3.0
"""What is asked of held-out clips, and of the fall of the tiled-against-untiled error."""
ALL_TERMS = [
    "vae_loss.squared=5",
    "vae_loss.gradient=1",
    "vae_loss.perceptual=0.1",
    "vae_loss.adversarial=0.05",
    "vae_loss.kl=1e-6",
    "vae_loss.discriminator.base_channels=16",
    "vae_loss.discriminator.layers=2",
    "vae_loss.discriminator.norm_groups=4",
    "vae_loss.discriminator_lr=1e-3",
]
ABSOLUTE = [
    "vae_loss.squared=0", "vae_loss.gradient=0", "vae_loss.perceptual=0", "vae_loss.adversarial=0",
    "vae_loss.kl=1e-6",
]  # fmt: skip
VERDICT_FROM = 0.85
"""Share of the updates after which the discriminator's verdict counts."""
TILES = ["vae.tile_size_px=32", "vae.tile_frames=8", "vae.tile_overlap=0.5"]
"""Small enough that clips of 64 pixels and 17 frames have several."""


def main() -> None:
    """Run what is missing and print one line of JSON."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/vae-bench"))
    parser.add_argument("--steps", type=int, default=1700, help="updates with all terms")
    parser.add_argument("--media", type=Path, help="folder of real clips with a manifest.jsonl")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few updates, made anew")
    options = parser.parse_args()
    if not options.quick:
        print(json.dumps(measure(options.folder, options, clips=384)))
        return
    options.steps, options.threads = 4, 1
    with TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options, clips=6)))


def measure(folder: Path, options: Namespace, clips: int) -> dict[str, Any]:
    """Return the figures of all three runs."""
    make_clips(folder, clips, options.media)
    steps, tiled_steps = options.steps, max(2, options.steps // 4)
    start = [f"vae_loss.adversarial_start={round(VERDICT_FROM * steps)}"]
    whole = part(folder / "all", options, [*ALL_TERMS, *start], steps)
    # Of the updates alone: what a short run takes to start would count as much.
    trial = part(folder / "trial", options, ABSOLUTE, max(2, steps // 20))
    alone_steps = round(steps * whole["step_s"] / trial["step_s"])
    alone = part(folder / "absolute", options, ABSOLUTE, max(2, alone_steps))
    phase = [
        f"stage.init_from={folder / 'all'}",
        "vae_training.tiling_share=0.5",
        f"vae_training.tiling_consistency={0.0 if options.quick else 4.0}",
        "optimizer.muon_lr=1e-3",
        "optimizer.lr=2.5e-4",
        *TILES,
        *ALL_TERMS,
        f"vae_loss.adversarial_start={tiled_steps}",
    ]
    tiled = part(folder / "tiled", options, phase, tiled_steps)
    held = folder / "held-out"
    ours, plain, after = (scores(folder / n / "vae", held) for n in ("all", "absolute", "tiled"))
    before = tiling_error(folder / "all" / "vae", held)
    behind = tiling_error(folder / "tiled" / "vae", held)
    video = {name: found["video"] for name, found in
             (("all", ours), ("absolute", plain), ("tiled", after))}  # fmt: skip
    return {
        "benchmark": "vae_training",
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "real_clips": bool(options.media),
        "figures": {
            "all_terms": {**whole, **ours},
            "absolute_alone": {**alone, **plain},
            "after_tiling_phase": {**tiled, **after},
            "tiled_error_before": before,
            "tiled_error_after": behind,
            "tiled_error_ratio": before / behind,
        },
        "holds": {
            "psnr": video["all"]["psnr_db"] >= PSNR_DB,
            "ssim": video["all"]["ssim"] > video["absolute"]["ssim"],
            "perceptual": video["all"]["gabor-pyramid"] < video["absolute"]["gabor-pyramid"],
            "tiling": before / behind >= TILED,
        },
    }


def make_clips(folder: Path, clips: int, media: Path | None) -> None:
    """Draw clips to train on and clips to measure, and put real ones beside the former."""
    if (folder / "held-out" / "manifest.jsonl").is_file():
        return
    train = folder / "train"
    write_shapes_dataset(train, clips, clips // 2, 0)
    write_shapes_dataset(folder / "held-out", max(4, clips // 8), max(4, clips // 16), 1)
    if media is None:
        return
    (train / "media").symlink_to(media.resolve())
    rows = [json.loads(line) for line in (media / "manifest.jsonl").read_text().splitlines()]
    with (train / "manifest.jsonl").open("a") as manifest:
        for row in rows:
            manifest.write(json.dumps({"file": f"media/{row['file']}", "caption": "a clip"}) + "\n")


def part(folder: Path, options: Namespace, fields: Sequence[str], steps: int) -> dict[str, Any]:
    """Train once, and return its updates, processor seconds and wall seconds."""
    note = folder / "part.json"
    if note.is_file():
        return json.loads(note.read_text())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = [
        "recipe=demo", "stage=demo_vae", f"data.source={folder.parent / 'train'}",
        f"run.dir={folder}", f"stage.steps={steps}", f"run.threads={options.threads}",
        f"optimizer.warmup_steps={min(20, steps // 2)}", *fields,
    ]  # fmt: skip
    run_ranks("train", arguments, 1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {
        "steps": steps,
        "cpu_s": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "step_s": sum(row["step_s"] for row in rows) / len(rows),
    }
    note.write_text(json.dumps(found))
    return found


def held_out(folder: Path) -> list[torch.Tensor]:
    """Return held-out samples [1, 3, F, H, W] in [-1, 1], spread over the buckets of the demo."""
    data = replace(compose_config(["recipe=demo"]).data, source=str(folder))
    store = PixelStore(data, str(folder), 0)
    rows = choose_rows(cells_of([store], data), 8)
    clips = [torch.from_numpy(store.load(n, 0)) for numbers in rows.values() for n in numbers]
    return [clip.permute(3, 0, 1, 2)[None].float() / 127.5 - 1 for clip in clips]


@torch.no_grad()
def scores(vae_folder: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Return PSNR, SSIM and the perceptual distance of images and of videos, computed whole."""
    vae, distance = load_vae(vae_folder), build_perceptual("", "cpu")
    found = ReconstructionScores(distance)
    with vae.tiling(on=False):
        for pixels in held_out(folder):
            found.add(vae.decode(vae.encode(pixels).mode()), pixels)
    return {
        medium: {"psnr_db": s.psnr_db, "ssim": s.ssim, distance.name: s.perceptual}
        for medium, s in found.scores().items()
    }


@torch.no_grad()
def tiling_error(vae_folder: Path, folder: Path) -> float:
    """Return the mean absolute difference of what tiles and the whole reconstruct."""
    vae, differences = load_vae(vae_folder), []
    vae.cfg = compose_config(["recipe=demo", *TILES]).vae
    for pixels in held_out(folder):
        if pixels.shape[2] < 17:
            continue
        with vae.tiling(on=False):
            whole = vae.decode(vae.encode(pixels).mode())
        with vae.tiling(on=True):
            tiled = vae.decode(vae.encode(pixels).mode())
        differences.append((whole - tiled).clamp(-2, 2).abs().mean())
    return torch.stack(differences).mean().item()


if __name__ == "__main__":
    main()

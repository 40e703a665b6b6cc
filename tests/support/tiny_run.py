"""A real but tiny run for tests: generated clips, a small VAE, a latent store, overrides."""

import json
import sys
from pathlib import Path
from subprocess import CompletedProcess, run
from tempfile import TemporaryDirectory

import torch
from forked import Job

from hunyuan_train.config.compose import compose_config
from hunyuan_train.data.shapes import write_shapes_dataset
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.encoders.text import build_text_encoder
from hunyuan_train.engine.precompute import precompute
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import save_vae

MODEL = [
    "model.hidden_size=32",
    "model.num_heads=2",
    "model.rope_axes=[4,6,6]",
    "model.num_double_blocks=1",
    "model.num_single_blocks=2",
]


def make_data(folder: Path, num_clips: int = 8, num_images: int = 4) -> Path:
    """Write clips, a VAE with random weights and a latent store below ``folder``."""
    torch.manual_seed(0)
    write_shapes_dataset(
        folder / "clips",
        num_clips,
        num_images,
        0,
        frame_sizes=[(64, 64), (96, 64)],
        clip_frames=[5],
    )
    vae = build_vae(VaeConfig(block_channels=[4, 8, 8, 8], layers_per_block=1, norm_groups=4))
    save_vae(vae, folder / "vae")
    cfg = compose_config(
        [
            f"data.source={folder / 'clips'}",
            f"data.latents={folder / 'latents'}",
            "data.anchors=[64]",
            "data.durations=[1,5]",
            "data.assign=every",
            "data.bucket_stride=32",
        ]
    )
    encoder = LatentEncoder(vae, scaling_factor=vae.cfg.scaling_factor)
    precompute(cfg.data, encoder, build_text_encoder(cfg.text))
    return folder


def overrides(data: Path, run: Path, *extra: str) -> list[str]:
    """Return the overrides of a short run on :func:`make_data`'s folder; later ones win."""
    return [
        "data=shapes",
        f"data.latents={data / 'latents'}",
        f"run.vae={data / 'vae'}",
        f"run.dir={run}",
        "run.device=cpu",
        *MODEL,
        "optimizer.lr=1e-3",
        "optimizer.warmup_steps=2",
        "stage.steps=6",
        "data.max_tokens=64",
        "logging.every_steps=1",
        "logging.progress=off",
        *extra,
    ]


def command(verb: str, arguments: list[str], ranks: int = 1) -> list[str]:
    """Return the command line of a verb, under torchrun when there are several ranks."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    return [*start, "-m", "hunyuan_train", verb, *arguments]


def run_command(verb: str, arguments: list[str], ranks: int = 1) -> CompletedProcess[str]:
    """Run a verb as users do, by the interpreter or torchrun, and return what it printed."""
    return run(
        command(verb, arguments, ranks), capture_output=True, text=True, timeout=240, check=False
    )


def run_verb(verb: str, arguments: list[str], ranks: int = 1) -> CompletedProcess[str]:
    """Run a verb's ranks to their end, started in a moment, and return what they printed."""
    with TemporaryDirectory() as folder:
        job = Job(verb, arguments, ranks, Path(folder) / "log")
        code = job.end(240)
        said = job.said()
    return CompletedProcess([verb, *arguments], code, said, said)


def rows(run: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

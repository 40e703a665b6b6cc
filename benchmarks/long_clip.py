"""Encode clips of 1, 5 and 10 minutes to latents and see that memory does not grow with length.

Each clip is made on the spot (moving noise, H.264), and encoded by `hunyuan-train encode`'s code in
a process of its own, whose peak resident memory is taken. The VAE has the released tiles (256 px,
64 frames) and few channels, so that time is bearable on two cores; frame rate and size are in the
figures. A short clip is encoded by diffusers too, with the same weights and tiles.

    python benchmarks/long_clip.py
    python benchmarks/long_clip.py --fps 24 --minutes 1 5 10
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from _measure import Report, at_most

from hunyuan_train.engine.clip_latents import encode_clip
from hunyuan_train.memory.vae import vae_peak_bytes
from hunyuan_train.models.vae.build import build_vae
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.state_dict import config_to_released, load_vae, save_vae

GIB = 2**30
MOST_GIB = 4.0
MOST_GROWTH = 1.05
MOST_ERROR = 2e-5


def write_clip(path: Path, frames: int, height: int, width: int, fps: int) -> None:
    """Write noise that moves, one frame at a time."""
    noise = np.random.default_rng(0).integers(0, 255, (height // 8, width // 8, 3), np.uint8)
    picture = noise.repeat(8, 0).repeat(8, 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(frames):
            moved = np.ascontiguousarray(np.roll(picture, 4 * number, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        container.mux(stream.encode())


def write_vae(folder: Path, quick: bool) -> VaeConfig:
    """Write a thin VAE with random weights."""
    tiles = {"tile_size_px": 32, "tile_frames": 16} if quick else {}
    cfg = VaeConfig(
        block_channels=[2, 2, 4, 4], layers_per_block=1, norm_groups=2, mid_attention=False, **tiles
    )
    torch.manual_seed(0)
    vae = build_vae(cfg)
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_vae(vae, folder)
    return cfg


def peak_gib() -> float:
    """Return the most resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


def encode_here(clip: Path, vae: Path) -> dict[str, Any]:
    """Encode a clip and return what it took; meant for a fresh process."""
    before, out = peak_gib(), clip.with_suffix(".safetensors")
    summary = encode_clip(load_vae(vae), clip, out, dtype=torch.float32)
    size = out.stat().st_size
    return {
        "before_gib": before,
        "peak_gib": peak_gib(),
        "latents_gib": size / GIB,
        **asdict(summary),
    }


def against_diffusers(clip: Path, folder: Path) -> dict[str, Any]:
    """Return the relative difference of a clip's latents to those of diffusers' tiled encode.

    In float64: norms over large flat areas turn the rounding of float32 into thousandths.
    """
    from diffusers import AutoencoderKLHunyuanVideo
    from safetensors.torch import load_file

    out = clip.with_suffix(".safetensors")
    vae = load_vae(folder).double()
    encode_clip(vae, clip, out, dtype=torch.float32)
    with av.open(str(clip)) as container:
        frames = [frame.reformat(format="gbrp").to_ndarray() for frame in container.decode(video=0)]
    pixels = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    pixels = pixels.double()
    theirs = AutoencoderKLHunyuanVideo(**config_to_released(vae.cfg)).double()
    theirs.load_state_dict(vae.state_dict())
    theirs.enable_tiling()
    cfg = vae.cfg
    theirs.tile_sample_min_height = theirs.tile_sample_min_width = cfg.tile_size_px
    theirs.tile_sample_stride_height = theirs.tile_sample_stride_width = cfg.tile_stride_px
    theirs.tile_sample_min_num_frames = cfg.tile_frames
    theirs.tile_sample_stride_num_frames = cfg.tile_stride_frames
    with torch.no_grad():
        expected = theirs.encode(pixels).latent_dist.mean[0]
    found = load_file(out)["mean"]
    return {"error": ((found - expected).norm() / expected.norm()).item(), "frames": len(frames)}


def fresh(*arguments: str | Path) -> dict[str, Any]:
    """Run a part of this script in a process of its own and return what it prints last."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measure(report: Report, args: argparse.Namespace, folder: Path) -> None:
    """Fill the report."""
    height, width = (64, 96) if args.quick else (480, 640)
    minutes = [0.05, 0.1] if args.quick else args.minutes
    cfg = write_vae(folder / "vae", args.quick)
    clip, peaks = folder / "clip.mp4", {}
    for length in minutes:
        frames = round(length * 60 * args.fps) // 4 * 4 + 1
        started = time.perf_counter()
        write_clip(clip, frames, height, width, args.fps)
        made = time.perf_counter() - started
        found = fresh("--encode", clip, folder / "vae")
        peaks[length] = found["peak_gib"]
        report.add(f"{length:g} min", at_most(found["peak_gib"], MOST_GIB, making_s=made, **found))
    growth = peaks[max(minutes)] / peaks[min(minutes)]
    report.add("growth", at_most(growth, MOST_GROWTH, of=max(minutes), over=min(minutes)))
    predicted = vae_peak_bytes(cfg, (cfg.tile_frames + 1, height, width))
    report.add("predicted tile", {"value": predicted / GIB, "unit": "GiB"})
    write_clip(clip, cfg.tile_frames + 13, height, width, args.fps)
    found = fresh("--compare", clip, folder / "vae")
    error = found.pop("error")
    report.add("against diffusers", at_most(error, MOST_ERROR, **found))


def main() -> None:
    """Measure, or be one of the processes that are measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few seconds of tiny video")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 5, 10])
    parser.add_argument("--fps", type=int, default=2)
    parser.add_argument("--encode", nargs=2, type=Path, metavar=("CLIP", "VAE"))
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("CLIP", "VAE"))
    args = parser.parse_args()
    if args.encode or args.compare:
        found = encode_here(*args.encode) if args.encode else against_diffusers(*args.compare)
        print(json.dumps(found))
        return
    report = Report("long_clip", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        measure(report, args, Path(folder))
    report.finish()


if __name__ == "__main__":
    main()

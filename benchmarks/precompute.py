"""Time precompute against its bare encoders, and a second run over 10,000 unchanged files.

Bare: the same clips, decoded in memory already, through the VAE and the text encoder in the same
batches, nothing kept. Precompute: from the files to the committed store. Both run in one process
with one thread for the encoders, in turns; the figure is the median of the ratios. A second one
divides precompute by the time that its own encoders took inside it.

    python benchmarks/precompute.py
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import torch
from _measure import Report, at_most
from PIL import Image

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.dataset import decode_samples
from hunyuan_train.data.manifest import list_sources
from hunyuan_train.encoders.config import TextEncoderConfig, TextEncoderKind
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.encoders.text import TextEncoder, build_text_encoder
from hunyuan_train.engine.precompute import precompute
from hunyuan_train.engine.precompute_stages import STAGES
from hunyuan_train.models.vae.config import VaeConfig
from hunyuan_train.models.vae.model import CausalVae3D

VAE = VaeConfig(block_channels=[8, 16, 16, 16], norm_groups=4, layers_per_block=1)
"""A fraction of the released one: 1 s per clip here, as that takes on a GPU."""
TEXT_BATCH = 32


class MeanVae:
    """Block means in place of latents, at the price of reading the pixels."""

    fingerprint, scaling_factor = "means", 1.0

    def encode(self, clips: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return means of 8 x 8 pixels, twice."""
        pixels = torch.stack([torch.from_numpy(clip[::4]) for clip in clips]).movedim(4, 1)
        mean = torch.nn.functional.avg_pool3d(pixels.float(), (1, 8, 8))
        return mean, mean


def write_clips(folder: Path, clips: int, frames: int, side: int) -> None:
    """Write clips of moving noise, every fourth a picture, with captions in a manifest."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(clips):
        file = f"c{number:05d}.{'jpg' if number % 4 == 3 else 'mp4'}"
        small = rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8)
        picture = np.asarray(Image.fromarray(small).resize((side, side)))
        if file.endswith("jpg"):
            Image.fromarray(picture).save(folder / file)
        else:
            with av.open(str(folder / file), "w") as out:
                stream = out.add_stream("libx264", rate=24)
                stream.width = stream.height = side
                stream.pix_fmt = "yuv420p"
                for index in range(frames):
                    frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * index, 1), "rgb24")
                    out.mux(stream.encode(frame))
                out.mux(stream.encode())
        words = rng.integers(0, 500, 12)
        rows.append({"file": file, "caption": " ".join(f"word{word}" for word in words)})
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))


def bare_s(cfg: DataConfig, vae: LatentEncoder, text: TextEncoder) -> float:
    """Return the seconds of both encoders over all clips, which are decoded before."""
    sources = list_sources(cfg.source).sources
    buckets: dict[Bucket, list[np.ndarray]] = defaultdict(list)
    captions: dict[str, list[str]] = defaultdict(list)
    for source in sources:
        for sample in decode_samples(source.path, source.media, cfg, cfg.bucket_table()):
            buckets[sample.bucket].append(sample.pixels)
            captions[sample.bucket.media].append(source.caption)
    started = time.perf_counter()
    for bucket, clips in buckets.items():
        batch = max(1, cfg.encode_pixels // (bucket.frames * bucket.height * bucket.width))
        for first in range(0, len(clips), batch):
            vae.encode(clips[first : first + batch])
    for media, texts in captions.items():
        for first in range(0, len(texts), TEXT_BATCH):
            text.encode(texts[first : first + TEXT_BATCH], media)
    return time.perf_counter() - started


def overhead(report: Report, folder: Path, clips: int, repeats: int, side: int) -> None:
    """Add the figure of precompute over its encoders, and what each stage took."""
    torch.manual_seed(0)
    vae = LatentEncoder(CausalVae3D(VAE).eval())
    text = build_text_encoder(TextEncoderConfig(kind=TextEncoderKind.builtin, text_dim=64))
    write_clips(folder / "clips", clips, 17, side)
    ratios, insides, rows = [], [], {}
    for repeat in range(repeats):
        cfg = DataConfig(
            source=str(folder / "clips"),
            latents=str(folder / f"store{repeat}"),
            anchors=[side],
            shard_sources=max(4, clips // 4),
            encode_pixels=17 * side * side,
        )
        bare = bare_s(cfg, vae, text)
        started = time.perf_counter()
        summary = precompute(cfg, vae, text)
        taken = time.perf_counter() - started
        ratios.append(taken / bare)
        assert summary.encoded == summary.ok == clips, summary
        stats = json.loads((Path(cfg.latents) / "precompute.json").read_text())
        rows = stats["total"]["stages"]
        insides.append(taken / (rows["vae"]["seconds"] + rows["text"]["seconds"]))
    ratio = round(statistics.median(ratios), 4)
    each = [round(value, 3) for value in ratios]
    stages = {name: rows[name] for name in STAGES}
    inside = round(statistics.median(insides), 4)
    # Of one run: other load on the machine does not move it as it does two runs one after another.
    report.add("over_encoders_in_it", at_most(inside, 1.05, runs=[round(r, 3) for r in insides]))
    report.add("over_encoders", at_most(ratio, 1.05, runs=each, clips=clips, stages=stages))


def second_run(report: Report, folder: Path, files: int) -> None:
    """Add the figures of a first and a second run over many small pictures."""
    source = folder / "pictures"
    source.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(files):
        name = f"p{number:05d}.jpg"
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), np.uint8)).save(source / name)
        rows.append({"file": name, "caption": f"picture number {number} of many"})
    (source / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))
    text = build_text_encoder(TextEncoderConfig(kind=TextEncoderKind.builtin, text_dim=16))
    cfg = DataConfig(source=str(source), latents=str(folder / "many"), anchors=[48])
    time.sleep(2.1)  # a file that is younger than that when it is read is read again
    for run in ("first_run_s", "second_run_s"):
        started = time.perf_counter()
        summary = precompute(cfg, MeanVae(), text)  # pyright: ignore[reportArgumentType]
        seconds = round(time.perf_counter() - started, 3)
        work = files if run == "first_run_s" else 0
        assert (summary.ok, summary.encoded) == (files, work), summary
        report.add(run, at_most(seconds, 10.0, files=files) if not work else {"value": seconds})


def main() -> None:
    """Measure and print one JSON object last."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="few small clips, once")
    parser.add_argument("--repeats", type=int, default=5, help="bare and precompute, so often")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(1)
    report = Report("precompute", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        overhead(report, Path(name), *((8, 1, 48) if quick else (64, arguments.repeats, 128)))
        second_run(report, Path(name), 100 if quick else 10_000)
    report.finish()


if __name__ == "__main__":
    main()

"""Time decoding while training: clips through the whole loader against the bare decoder.

Both decode the same clips in the same order with as many processes. The bare decoder drops the
pixels where it made them; the loader brings them to the training process, into the hands of the VAE
and from there into batches. The VAE itself is left out: it runs on the GPU. Both are timed while
they run: from the first result on, over one pass of all clips, in turns, several times.

    python benchmarks/decode.py
    python benchmarks/decode.py --media clips/ --workers 8
"""

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.decode_job import decode_clip
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.data.mixture import cells_of
from hunyuan_train.data.online import OnlineStore
from hunyuan_train.data.planner import StepPlanner

SAMPLE_MEDIA = Path(__file__).resolve().parents[2] / "shared" / "media"
MOST_SECONDS = 12
"""Longer clips are left out: the end of a pass would measure one of them."""


class NoVae:
    """Latents of the right shape, for nothing."""

    fingerprint = ""
    scaling_factor = 1.0

    def encode(self, clips: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return zeros."""
        frames, height, width, _ = clips[0].shape
        mean = torch.zeros(len(clips), 16, (frames - 1) // 4 + 1, height // 8, width // 8)
        return mean, mean


class NoText:
    """One token per caption."""

    fingerprint, text_length, text_dim, pooled_dim = "", 4, 4, 4

    def encode(self, captions: list[str], media: str) -> SimpleNamespace:
        """Return features."""
        size = len(captions)
        return SimpleNamespace(
            mask=torch.arange(4).expand(size, 4) < 1,
            states=torch.zeros(size, 4, 4),
            pooled=torch.zeros(size, 4),
        )


def bare(job: tuple) -> None:
    """Decode a clip and drop it."""
    decode_clip(*job)


def usable(media: Path) -> Path:
    """Write a manifest of the clips to time and return it."""
    rows = [json.loads(line) for line in (media / "manifest.jsonl").read_text().splitlines()]
    kept = [
        {"file": str((media / row["file"]).resolve()), "caption": "a clip"}
        for row in rows
        if row.get("expect", "ok") == "ok" and 0 < (row.get("seconds") or 0) < MOST_SECONDS
    ]
    manifest = Path(tempfile.mkdtemp()) / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return manifest


def generated(folder: Path) -> Path:
    """Write a few short clips with their manifest, as ``--media`` has it, and return the folder."""
    from hunyuan_train.data.shapes import write_shapes_dataset

    write_shapes_dataset(folder, 3, 0, 0, frame_sizes=[(64, 64)], clip_frames=[33])
    rows = [{"file": str(path), "seconds": 1.4} for path in sorted(folder.rglob("*.mp4"))]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def cpu_seconds() -> tuple[float, float]:
    """Return the CPU time of the decoding processes, and of this one."""
    tick = os.sysconf("SC_CLK_TCK")
    stats = [
        Path(f"/proc/{process.pid}/stat").read_text().rsplit(") ", 1)[1].split()
        for process in multiprocessing.active_children()
    ]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / tick, time.process_time()


def time_pass(results: Iterator[object], number: int) -> tuple[float, float, float]:
    """Return the seconds of ``number`` results after the first: wall, CPU of workers, CPU here."""
    next(results)
    workers, here = cpu_seconds()
    started = time.perf_counter()
    for _ in itertools.islice(results, number):
        pass
    wall = time.perf_counter() - started
    workers_now, here_now = cpu_seconds()
    return wall, workers_now - workers, here_now - here


def make_loader(store: OnlineStore, cfg: DataConfig) -> BucketLoader:
    """Return a loader of single clips."""
    cells = cells_of([store], cfg)
    costs = [float(cell.bucket.tokens) for cell in cells]
    planner = StepPlanner(cells, costs, [1] * len(cells), cfg, 0, 1, 1)
    return BucketLoader([store], planner, cfg, 0)


def updates(loader: BucketLoader) -> Iterator[list[str]]:
    """Yield the samples of one update after the other."""
    while True:
        yield [name for batch in loader.next_step() for name in batch.sample_ids]


def main() -> None:
    """Print what was measured, and one JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--media", type=Path, default=SAMPLE_MEDIA, help="folder with a manifest")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="three small made-up clips, one pass")
    args = parser.parse_args()
    anchor = 256
    if args.quick:
        args.media, args.workers, args.repeats = generated(Path(tempfile.mkdtemp())), 1, 1
        anchor = 64
    machine = {"device": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    if not (args.media / "manifest.jsonl").is_file():
        reason = f"{args.media}/manifest.jsonl does not exist"
        figures = {"loader_over_decoder": {"skipped": reason}}
        print(json.dumps({"benchmark": "decode", "machine": machine, "figures": figures}))
        return
    manifest = usable(args.media)
    cfg = DataConfig(
        source=str(manifest),
        latents=str(manifest.parent / "index"),
        anchors=[anchor],
        durations=[33],
        max_crop_loss=1.0,
        workers=args.workers,
    )
    store = OnlineStore(cfg, NoVae(), NoText())
    clips = len(store.index)
    rows = [store.index.row(number) for number in range(clips)]
    jobs = {row.sample_id: store.job(row, 0) for row in rows}
    order = make_loader(store, cfg)
    names = [name for update in itertools.islice(updates(order), clips + 1) for name in update]
    order.close()
    times: dict[str, list[tuple[float, float, float]]] = {"decoder": [], "loader": []}
    for _ in range(args.repeats):
        with multiprocessing.get_context("forkserver").Pool(args.workers) as pool:
            results = pool.imap(bare, [jobs[name] for name in names])
            times["decoder"].append(time_pass(results, clips))
        loader = make_loader(store, cfg)
        times["loader"].append(time_pass(updates(loader), clips))
        assert not loader.replaced, "all clips decode"
        loader.close()
    shutil.rmtree(manifest.parent)
    rates = {name: [clips / wall for wall, *_ in found] for name, found in times.items()}
    cpu = {
        name: [
            round(statistics.median(found[kind] for found in times[name]) / clips, 3)
            for kind in (1, 2)
        ]
        for name in times
    }
    ratios = [ours / bare for ours, bare in zip(rates["loader"], rates["decoder"], strict=True)]
    for name, found in rates.items():
        print(
            f"{name:>8}: {statistics.median(found):6.2f} clips/s of 33 x 256 x 256; CPU seconds "
            f"per clip {cpu[name][0]:.3f} in the processes, {cpu[name][1]:.3f} in training"
        )
    ratio = statistics.median(ratios)
    processes, training = (sum(cpu["loader"]) / sum(cpu["decoder"]), cpu["loader"][1])
    figures = {
        "loader_over_decoder": {"value": ratio, "target": ">= 0.9", "holds": ratio >= 0.9},
        "loader_over_decoder_of_each_pass": {"value": ratios},
        "decoder_clips_per_s": {"value": statistics.median(rates["decoder"])},
        "loader_clips_per_s": {"value": statistics.median(rates["loader"])},
        "cpu_s_over_decoder": {"value": processes},
        "cpu_s_per_clip_in_training": {"value": training},
    }
    print(json.dumps({"benchmark": "decode", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()

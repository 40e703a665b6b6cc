"""Time the latent store: bytes per second, the first batch of a large index, memory of a huge one.

Read, checked against their digests, converted to float32 and looked through for NaN, by two
threads, from the page cache. What the 13B model consumes is its training FLOPs at half of the bf16
peak of one H100; captions have all 256 tokens, which is the most that a sample reads. Decoding is
timed by decode.py.

The tensors are random numbers. The index of the first batch is complete: every row, caption and
name is written; its rows share the shards of the throughput part. The huge index has files of full
size of which only the rows that are drawn are written, the rest being holes: what an open index
keeps in memory does not depend on it.

    python benchmarks/loader.py
    python benchmarks/loader.py --quick
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.cost import sample_cost
from hunyuan_train.data.index import (
    FILES,
    FORMAT,
    HEADER,
    ROW,
    SHARD,
    TEXT,
    Blob,
    Index,
    SampleRow,
    TextRef,
    digest_of_header,
)
from hunyuan_train.data.index_writer import IndexWriter, write_index
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.data.mixture import cells_of
from hunyuan_train.data.parts import Part, PartStore
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.data.store import META, LatentStore, StoreMeta
from hunyuan_train.models.hunyuan.config import HunyuanConfig

BUCKETS = {
    Bucket(1, 256, 256): 256,
    Bucket(1, 512, 512): 512,
    Bucket(1, 1024, 1024): 1024,
    Bucket(65, 256, 448): 256,
    Bucket(129, 368, 640): 540,
    Bucket(129, 544, 960): 720,
    Bucket(65, 720, 1280): 960,
    Bucket(129, 720, 1280): 960,
}
MODEL = HunyuanConfig()
TEXT_TOKENS = 256
H100_FLOPS = 0.5 * 989e12
THREADS = 2
CHUNK = 100_000
_ID_DIGITS = 10


def write_shards(folder: Path, bucket_bytes: int) -> list[SampleRow]:
    """Write random samples of every bucket as precompute would, and return their rows."""
    parts = PartStore(folder)
    rows = []
    for bucket, anchor in BUCKETS.items():
        mean = torch.randn(MODEL.out_channels, *bucket.latent_shape).half()
        states = torch.randn(TEXT_TOKENS, MODEL.text_dim).half()
        pooled = torch.randn(MODEL.pooled_dim).half()
        count = max(4, bucket_bytes // (4 * mean.numel() + 2 * states.numel()))
        part = Part()
        for number in range(count):
            key, text = f"{bucket}-{number:04d}", f"text-{bucket}-{number:04d}"
            part.sources[key] = {"rows": [{}]}
            part.texts[text] = {"tokens": TEXT_TOKENS}
            part.tensors |= {f"{key}/0/mean": mean.clone(), f"{key}/0/std": mean.abs()}
            part.tensors |= {f"{text}/pooled": pooled.clone(), f"{text}/states": states.clone()}
        name = parts.commit(part)
        for number in range(count):
            place = part.texts[f"text-{bucket}-{number:04d}"]
            blob = Blob(name, place["offset"], place["nbytes"], place["digest"])
            source = f"clips/{bucket}/{number:04d}.mp4"
            rows.append(
                SampleRow(
                    sample_id=f"{source}@{anchor}:{bucket}",
                    source=source,
                    bucket=bucket,
                    anchor=anchor,
                    concept="",
                    repeat=1,
                    fps=24.0,
                    scale=0.5,
                    crop_loss=0.05,
                    latents=Blob(
                        name, **part.sources[f"{bucket}-{number:04d}"]["rows"][0]["latents"]
                    ),
                    texts=(TextRef(caption="a caption", blob=blob, tokens=TEXT_TOKENS),),
                )
            )
    return rows


def open_store(folder: Path, index: str, row: SampleRow, cfg: DataConfig) -> LatentStore:
    """Name ``index`` in the store's meta data and open it."""
    text = row.texts[0]
    empty = {**dataclasses.asdict(text.blob), "tokens": text.tokens}
    meta = StoreMeta(
        format=FORMAT,
        index=index,
        storage_dtype="float16",
        latent_channels=MODEL.out_channels,
        text_length=TEXT_TOKENS,
        text_dim=MODEL.text_dim,
        pooled_dim=MODEL.pooled_dim,
        vae_fingerprint="",
        scaling_factor=0.476986,
        text_fingerprint="",
        config_hash="",
        empty_texts={"image": empty, "video": empty},
    )
    (folder / META).write_text(json.dumps(dataclasses.asdict(meta)))
    return LatentStore.open(folder, cfg)


def seconds_of(store: LatentStore, numbers: range) -> float:
    """Return the seconds in which the threads load all of ``numbers``."""

    def work(thread: int) -> None:
        for number in numbers[thread::THREADS]:
            store.load(number, 0)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(THREADS)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def throughput(store: LatentStore, repeats: int) -> dict[str, dict]:
    """Measure every bucket in turn, several times; return figures of all and of each."""
    groups = {group.bucket: group for group in store.index.groups}
    sizes = {}
    for bucket, group in groups.items():
        row = store.index.row(group.first)
        sizes[bucket] = group.count * (row.latents.nbytes + row.texts[0].blob.nbytes)
    seconds: dict[Bucket, list[float]] = {bucket: [] for bucket in groups}
    cpu_s, cpu_bytes = 0.0, 0
    for repeat in range(repeats + 1):
        for bucket, group in groups.items():
            busy = time.process_time()
            taken = seconds_of(store, range(group.first, group.first + group.count))
            if repeat:  # the first time fills the page cache
                seconds[bucket].append(taken)
                cpu_s += time.process_time() - busy
                cpu_bytes += sizes[bucket]
    middle = {bucket: statistics.median(times) for bucket, times in seconds.items()}
    figures = {
        "gb_per_s": at_least(sum(sizes.values()) / sum(middle.values()) / 1e9, 1.5),
        "gb_per_s_lowest_bucket": at_least(
            min(sizes[bucket] / middle[bucket] for bucket in groups) / 1e9, 1.5
        ),
        # What two cores would reach that do nothing else; the figures above are of the wall clock.
        "gb_per_2_cpu_s": {"value": round(2 * cpu_bytes / cpu_s / 1e9, 3)},
    }
    for bucket, group in groups.items():
        needed = H100_FLOPS / sample_cost(bucket, TEXT_TOKENS, MODEL)
        rate = group.count / middle[bucket]
        figures[f"times_h100_{bucket}"] = {
            **at_least(rate / needed, 20.0),
            "gb_per_s": round(sizes[bucket] / middle[bucket] / 1e9, 3),
        }
    return figures


def records(first: int, count: int, kinds: list[SampleRow]) -> tuple[np.ndarray, ...]:
    """Return ROW and TEXT records and the strings, uint8, of rows that differ in their names."""
    head, tail = b"clips/", f".mp4@256:{kinds[0].bucket}".encode()
    caption = b"a synthetic caption that is about as long as a short sentence"
    line = head + b"0" * _ID_DIGITS + tail + caption
    strings = np.tile(np.frombuffer(line, np.uint8), (count, 1))
    numbers = np.arange(first, first + count)
    for digit in range(_ID_DIGITS):
        place = len(head) + _ID_DIGITS - 1 - digit
        strings[:, place] = numbers // 10**digit % 10 + ord("0")
    rows, texts = np.zeros(count, ROW), np.zeros(count, TEXT)
    for start, kind in enumerate(kinds):
        blob, text = kind.latents, kind.texts[0].blob
        for name in ("offset", "nbytes", "digest"):
            rows[f"latents_{name}"][start :: len(kinds)] = getattr(blob, name)
            texts[name][start :: len(kinds)] = getattr(text, name)
    size = len(head) + _ID_DIGITS + len(tail)
    rows["id_offset"] = np.arange(count) * len(line)
    rows["id_nbytes"], rows["source_nbytes"] = size, len(head) + _ID_DIGITS + 4
    rows["first_text"], rows["texts"], rows["crop_loss"] = np.arange(count), 1, 0.05
    texts["caption_offset"] = rows["id_offset"] + np.uint64(size)
    texts["caption_nbytes"], texts["tokens"] = len(caption), TEXT_TOKENS
    return rows, texts, strings


def write_full(folder: Path, kinds: list[SampleRow], total: int) -> str:
    """Write a complete index of ``total`` rows, whose tensors are those of ``kinds``."""
    with IndexWriter(folder) as writer:
        blobs = [kind.latents for kind in kinds] + [kind.texts[0].blob for kind in kinds]
        for blob in blobs:
            assert writer.shard(blob.shard, blob.offset + blob.nbytes) == 0
        writer.group("", kinds[0].bucket, 256, 1)
        for first in range(0, total, CHUNK):
            rows, texts, strings = records(first, min(CHUNK, total - first), kinds)
            writer.append(rows, texts, strings.tobytes())
        return writer.finish()


def write_holes(folder: Path, kinds: list[SampleRow], total: int) -> str:
    """Make an index of ``total`` rows of which none is written yet."""
    line = records(0, 1, kinds)[2].nbytes
    name = kinds[0].latents.shard.encode()
    sizes = (total * ROW.itemsize, total * TEXT.itemsize, SHARD.itemsize, total * line + len(name))
    group = {
        "concept": "",
        "bucket": str(kinds[0].bucket),
        "anchor": 256,
        "repeat": 1,
        "first": 0,
        "count": total,
        "crop_loss": 0.05,
        "tokens_of_text": float(TEXT_TOKENS),
    }
    files = {
        file: {"nbytes": size, "xxh3_128": ""} for file, size in zip(FILES, sizes, strict=True)
    }
    text = json.dumps(
        {"format": FORMAT, "rows": total, "shards": 1, "groups": [group], "files": files}
    )
    target = folder / digest_of_header(text)
    target.mkdir()
    (target / HEADER).write_text(text)
    for file, size in zip(FILES, sizes, strict=True):
        with (target / file).open("wb") as out:
            out.truncate(size)
    shard = np.array([(total * line, 0, len(name), 0)], SHARD)
    (target / "shards.bin").write_bytes(shard.tobytes())
    fill(target / "strings.bin", total * line, name)
    return target.name


def write_row(index: Path, number: int, kinds: list[SampleRow]) -> None:
    """Write one row into the holes."""
    rows, texts, strings = records(number, 1, kinds)
    rows["id_offset"] += np.uint64(number * strings.nbytes)
    texts["caption_offset"] += np.uint64(number * strings.nbytes)
    rows["first_text"] = number
    for file, data in zip(FILES, (rows, texts, None, strings), strict=True):
        if data is not None:
            fill(index / file, number * data.nbytes, data.tobytes())


def fill(path: Path, offset: int, data: bytes) -> None:
    """Write at a place of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def plan(store: LatentStore, cfg: DataConfig) -> StepPlanner:
    """Return a planner over the store, for updates of 64 ranks."""
    cells = cells_of([store], cfg)
    costs = [sample_cost(cell.bucket, TEXT_TOKENS, MODEL) for cell in cells]
    return StepPlanner(cells, costs, [8] * len(cells), cfg, 0, 64, 1)


def first_batch_s(folder: Path, index: str, row: SampleRow, cfg: DataConfig) -> float:
    """Return the seconds from nothing to the first batch, the index not in the page cache."""
    for file in (folder / index).iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    started = time.perf_counter()
    store = open_store(folder, index, row, cfg)
    loader = BucketLoader([store], plan(store, cfg), cfg, seed=0, rank=0, world_size=64)
    assert len(loader.next_step()[0].sample_ids) == 8
    taken = time.perf_counter() - started
    loader.close()
    return taken


def growth_gb(folder: Path, kinds: list[SampleRow], total: int, steps: int) -> float:
    """Return by how much memory grows when rows of ``steps`` updates are drawn and read."""
    name = write_holes(folder, kinds, total)
    for _, number in drawn(folder, name, kinds[0], steps):
        write_row(folder / name, number, kinds)
    # In a process of its own: in this one, memory that was freed hides what is taken.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(grown_gb, (folder, name, kinds[0], steps))


def drawn(folder: Path, index: str, row: SampleRow, steps: int) -> Iterator[tuple[Index, int]]:
    """Yield the open index and the number of every row of the first updates."""
    cfg = DataConfig()
    store = open_store(folder, index, row, cfg)
    planner = plan(store, cfg)
    for _ in range(steps):
        for unit in planner.next_step().units:
            for number, _ in planner.rows(unit):
                yield store.index, number


def grown_gb(folder: Path, name: str, first: SampleRow, steps: int) -> float:
    """Return the largest growth of this process over opening, drawing and reading."""
    before = highest = resident_gb()
    for index, number in drawn(folder, name, first, steps):
        row = index.row(number)
        assert row.sample_id.startswith(f"clips/{number:0{_ID_DIGITS}d}.mp4@256:"), row.sample_id
        highest = max(highest, resident_gb())
    return highest - before


def resident_gb() -> float:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e9


def at_least(value: float, target: float) -> dict:
    """Return a figure that should be high."""
    return {"value": round(value, 3), "target": f">= {target:g}", "holds": value >= target}


def at_most(value: float, target: float) -> dict:
    """Return a figure that should be low."""
    return {"value": round(value, 4), "target": f"<= {target:g}", "holds": value <= target}


def main() -> None:
    """Measure and print one JSON object last."""
    formatter = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--quick", action="store_true", help="smaller, with fewer repeats")
    parser.add_argument("--folder", help="where the stores are made; the temporary folder if empty")
    arguments = parser.parse_args()
    quick = arguments.quick
    torch.set_num_threads(1)
    cfg = DataConfig(workers=THREADS)
    rows, huge = (20_000, 1_000_000) if quick else (10_000_000, 100_000_000)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        kinds = write_shards(folder, (4 if quick else 192) << 20)
        store = open_store(folder, write_index(folder, kinds), kinds[0], cfg)
        load = os.getloadavg()[0]
        figures = throughput(store, 1 if quick else 7)
        clips = [kind for kind in kinds if kind.bucket == Bucket(65, 256, 448)]
        index = write_full(folder, clips, rows)
        times = [first_batch_s(folder, index, clips[0], cfg) for _ in range(3)]
        figures["first_batch_s"] = {**at_most(max(times), 3.0), "rows": rows}
        grown = growth_gb(folder, clips, huge, 5 if quick else 100)
        figures["index_memory_gb"] = {**at_most(grown, 1.0), "rows": huge}
    machine = {
        "device": platform.machine(),
        "cores": os.cpu_count(),
        "load": load,
        "threads": THREADS,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
    print(json.dumps({"benchmark": "loader", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()

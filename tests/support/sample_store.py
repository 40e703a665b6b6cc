"""A store whose samples are made up when they are read, with a real index."""

import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import FORMAT, Blob, Index, SampleRow, TextRef
from hunyuan_train.data.index_writer import write_index
from hunyuan_train.data.loader import BucketLoader
from hunyuan_train.data.mixture import cells_of
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.store import Sample, StoreMeta, Text

CHANNELS, LENGTH, WIDTH, POOLED = 2, 6, 3, 2


def make_row(number: int, bucket: Bucket, captions: int = 1, repeat: int = 1) -> SampleRow:
    source = f"{number:04d}.mp4"
    blob = Blob("shard", 0, 0, 0)
    return SampleRow(
        sample_id=f"{source}@64:{bucket}",
        source=source,
        bucket=bucket,
        anchor=64,
        concept="",
        repeat=repeat,
        fps=24.0,
        scale=1.0,
        crop_loss=0.1,
        latents=blob,
        texts=tuple(
            TextRef(caption=f"{number} as {variant}", blob=blob, tokens=1 + number % LENGTH)
            for variant in range(captions)
        ),
    )


def value_of(sample_id: str) -> float:
    """The number that fills the latents of a sample."""
    return float(zlib.crc32(sample_id.encode()) % 10_007)


class MadeUpStore:
    """A SampleStore; ``bad`` holds ids that fail, ``spoil`` may change or refuse a sample."""

    def __init__(self, folder: Path, rows: Iterable[SampleRow], name: str = "data") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.name = name
        self.index = Index.open(folder / write_index(folder, rows))
        self.meta = StoreMeta(
            format=FORMAT,
            index=self.index.folder.name,
            storage_dtype="float32",
            latent_channels=CHANNELS,
            text_length=LENGTH,
            text_dim=WIDTH,
            pooled_dim=POOLED,
            vae_fingerprint="",
            scaling_factor=1.0,
            text_fingerprint="",
            config_hash="",
            empty_texts={},
        )
        self.bad: set[str] = set()
        self.spoil: Callable[[SampleRow, Sample], Sample] | None = None
        self.delay_s = 0.0
        self.loaded: list[str] = []

    def load(self, number: int, variant: int) -> Sample:
        time.sleep(self.delay_s)
        row = self.index.row(number)
        self.loaded.append(row.sample_id)
        if row.sample_id in self.bad:
            raise SampleError(row.sample_id, Reason.checksum, "its bytes have changed")
        mean = torch.full((CHANNELS, *row.bucket.latent_shape), value_of(row.sample_id))
        tokens = row.texts[variant].tokens
        text = Text(
            states=torch.full((tokens, WIDTH), 1.0 + variant), pooled=torch.full((POOLED,), 2.0)
        )
        sample = Sample(mean=mean, std=mean / 2, text=text)
        return sample if self.spoil is None else self.spoil(row, sample)

    def empty(self, media: str) -> Text:
        return Text(states=torch.zeros(1, WIDTH), pooled=torch.zeros(POOLED))


def make_planner(
    stores: list[MadeUpStore], cfg: DataConfig, seed: int = 0, ranks: int = 1, micro_steps: int = 2
) -> StepPlanner:
    cells = cells_of(stores, cfg)
    tokens = [cell.bucket.tokens for cell in cells]
    batches = [max(1, min(cfg.max_tokens // number, cfg.max_batch)) for number in tokens]
    costs = [float(number) for number in tokens]
    return StepPlanner(cells, costs, batches, cfg, seed, ranks, micro_steps)


def make_loader(
    stores: list[MadeUpStore],
    cfg: DataConfig,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
    planned: int = 0,
    **more,
) -> BucketLoader:
    """A loader of one rank; the run was planned for ``planned`` ranks, by default ``ranks``."""
    planner = make_planner(stores, cfg, seed, planned or ranks)
    return BucketLoader(stores, planner, cfg, seed, rank, ranks, **more)

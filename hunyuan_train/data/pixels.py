"""Clips as pixels, for what is trained on them: decoded by processes, cut anew in every epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.child_process import as_sample_error
from hunyuan_train.data.config import DataConfig, Integrity
from hunyuan_train.data.dataset import Window
from hunyuan_train.data.decode_job import decode_clip
from hunyuan_train.data.fetch import Request
from hunyuan_train.data.index import FORMAT, Index, SampleRow
from hunyuan_train.data.manifest import VIDEO_SUFFIXES
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.scan import index_sources, probe_key
from hunyuan_train.data.store import StoreMeta
from hunyuan_train.runtime.seed import keyed_generator


@dataclass(kw_only=True, slots=True)
class PixelBatch:
    """One micro-batch of pixels on the CPU; the surface that it shares with latents is `Batch`'s.

    An absent sample is black.
    """

    bucket: Bucket
    weight: float
    """1; or 0 for samples that are not trained on and only keep ranks in step."""
    sample_ids: list[str]
    epochs: list[int]
    pixels: Tensor
    """[B, F, H, W, 3] uint8."""
    source: str = ""
    """Key in data.sources; empty for a single store."""

    def put(self, place: int, row: SampleRow, epoch: int, variant: int, sample: np.ndarray) -> None:
        """Write a sample, whose shape was checked, to a place of the batch."""
        assert row.bucket == self.bucket, "a micro-batch has one bucket"
        self.sample_ids[place] = row.sample_id
        self.epochs[place] = epoch
        self.pixels[place] = torch.from_numpy(sample)

    def clear(self) -> None:
        """Make all its samples black and take their weight, so that it only keeps ranks in step."""
        self.weight = 0.0
        self.pixels.zero_()


class PixelStore:
    """The samples of ``data.source`` as pixels; a ``SampleStore`` with batches of its own.

    Captions are not needed. A clip's frames are an even number of frames apart that is drawn anew
    in every epoch, as is where they begin.

    Args:
        cfg: Source, buckets, workers; the index goes to ``folder``.
        folder: Where the index is kept, in ``online/``.
        seed: Of the run; with a sample's name and epoch it decides how a clip is cut.
        max_interval: Most frames of the source per frame of a sample; 1 takes them all.
        name: Key in ``data.sources``; empty for a single store.

    Raises:
        ValueError: No file is usable.
    """

    decode: Callable[..., Any] = staticmethod(decode_clip)

    def __init__(
        self, cfg: DataConfig, folder: str, seed: int, max_interval: int = 1, name: str = ""
    ) -> None:
        if not cfg.source:
            raise ValueError(
                "data.source is empty; set it to the folder or manifest of clips and images that "
                "the VAE is trained on"
            )
        self.name = name
        # Damage beyond the frames of a cut is found when a cut meets it.
        self._cfg = replace(cfg, latents=folder, integrity=Integrity.used)
        self._seed, self._max_interval = seed, max_interval
        index = index_sources(self._cfg, text_length=1, captions=False)
        root = Path(cfg.source)
        self._root = root if root.is_dir() else root.parent
        self.index = Index.open(index)
        self.meta = StoreMeta(
            format=FORMAT,
            index=index.name,
            storage_dtype="uint8",
            latent_channels=3,
            text_length=1,
            text_dim=0,
            pooled_dim=0,
            vae_fingerprint="",
            scaling_factor=1.0,
            text_fingerprint="",
            config_hash=probe_key(cfg),
            empty_texts={},
        )

    def load(self, number: int, variant: int) -> np.ndarray:
        """Decode one row, as in epoch 0, on the calling thread: uint8 [F, H, W, 3].

        Raises:
            SampleError: This sample cannot be used; it says why.
        """
        row = self.index.row(number)
        try:
            return decode_clip(*self.job(row, 0))
        except Exception as error:
            raise as_sample_error(row.sample_id, error) from error

    def job(self, row: SampleRow, epoch: int) -> tuple[Any, ...]:
        """Return the arguments of ``decode`` for a row in an epoch."""
        path = self._root / row.source
        media = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"
        drawn = keyed_generator(self._seed, "window", row.sample_id, epoch)
        interval = int(drawn.integers(1, self._max_interval + 1))
        window = Window(interval=interval, offset=float(drawn.random()))
        return str(path), media, row.bucket, row.anchor, self._cfg, window

    def raw_bytes(self, bucket: Bucket) -> int:
        """Return the memory of the pixels of one sample."""
        return 3 * bucket.frames * bucket.height * bucket.width

    def encode(self, requests: Sequence[Request], decoded: Sequence[Any]) -> list[Any]:
        """Return the pixels as they are: nothing encodes them."""
        return list(decoded)

    def empty_batch(self, bucket: Bucket, size: int, weight: float) -> PixelBatch:
        """Return a batch with room for ``size`` samples, to be filled in place."""
        shape = (size, bucket.frames, bucket.height, bucket.width, 3)
        return PixelBatch(
            bucket=bucket,
            weight=weight,
            sample_ids=[""] * size,
            epochs=[0] * size,
            pixels=torch.zeros(shape, dtype=torch.uint8),
            source=self.name,
        )

    def batch_bytes(self, bucket: Bucket, size: int) -> int:
        """Return the memory of a batch, but for its names."""
        return size * self.raw_bytes(bucket)

    def check(self, sample: Any, row: SampleRow) -> None:
        """Check that a sample has the shape of its bucket.

        Raises:
            SampleError: It does not.
        """
        bucket = row.bucket
        wanted = (bucket.frames, bucket.height, bucket.width, 3)
        if sample.shape != wanted:
            detail = f"its pixels have shape {list(sample.shape)} instead of {list(wanted)}"
            raise SampleError(row.sample_id, Reason.damaged, detail)

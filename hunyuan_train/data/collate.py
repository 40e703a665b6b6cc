"""Samples of one bucket put side by side into a micro-batch."""

from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.index import SampleRow
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.store import RowStore, Sample, SampleStore, StoreMeta, Text
from hunyuan_train.runtime.seed import keyed_generator


class MicroBatch(Protocol):
    """What loader and loop need of a micro-batch, whatever its samples are made of."""

    bucket: Bucket
    weight: float
    """1; or 0 for samples that are not trained on and only keep ranks in step."""
    sample_ids: list[str]
    epochs: list[int]
    source: str

    def put(self, place: int, row: SampleRow, epoch: int, variant: int, sample: Any) -> None:
        """Write a sample, whose shapes were checked, to a place of the batch."""
        ...

    def clear(self) -> None:
        """Make all its samples empty and take their weight, so that it only keeps ranks in step."""
        ...


@runtime_checkable
class OwnBatches(Protocol):
    """A store whose samples are not latents and text."""

    def empty_batch(self, bucket: Bucket, size: int, weight: float) -> MicroBatch:
        """Return a batch with room for ``size`` samples, to be filled in place."""
        ...

    def batch_bytes(self, bucket: Bucket, size: int) -> int:
        """Return the memory of a batch, but for its names."""
        ...

    def check(self, sample: Any, row: SampleRow) -> None:
        """Raise SampleError unless a sample has the shape of its bucket."""
        ...


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch on the CPU; latents are unscaled posterior moments, to be sampled anew."""

    bucket: Bucket
    weight: float
    """1; or 0 for samples that are not trained on and only keep ranks in step."""
    sample_ids: list[str]
    epochs: list[int]
    mean: Tensor
    """[B, C, T, h, w] float32."""
    std: Tensor
    """[B, C, T, h, w] float32."""
    stills: Tensor | None
    """[B, 2, C, K, h, w] float32, mean and std of K frames encoded alone; None if K is 0."""
    still_frames: list[str]
    """Which frames these are, K names."""
    text: Tensor
    """[B, L, D] float32."""
    text_mask: Tensor
    """[B, L] bool, True for real tokens, right-padded."""
    pooled: Tensor
    """[B, P] float32."""
    empty_text: Tensor
    """[L, D] float32, states of the empty caption."""
    empty_mask: Tensor
    """[L] bool."""
    empty_pooled: Tensor
    """[P] float32."""
    captions: list[str]
    source: str = ""
    """Key in data.sources; empty for a single store."""

    def put(self, place: int, row: SampleRow, epoch: int, variant: int, sample: Sample) -> None:
        """Write a sample, whose shapes were checked, to a place of the batch."""
        assert row.bucket == self.bucket, "a micro-batch has one bucket"
        tokens = len(sample.text.states)
        self.sample_ids[place] = row.sample_id
        self.epochs[place] = epoch
        self.captions[place] = row.texts[variant].caption
        self.mean[place] = sample.mean
        self.std[place] = sample.std
        if self.stills is not None:
            assert sample.stills is not None, "check_sample has seen to it"
            self.stills[place] = sample.stills
        self.text[place, :tokens] = sample.text.states
        self.text[place, tokens:] = 0
        self.text_mask[place] = torch.arange(self.text.shape[1]) < tokens
        self.pooled[place] = sample.text.pooled

    def clear(self) -> None:
        """Make all its samples empty and take their weight, so that it only keeps ranks in step."""
        self.weight = 0.0
        self.mean.zero_()
        self.std.zero_()
        if self.stills is not None:
            self.stills.zero_()
        for place in range(len(self.sample_ids)):
            self.text[place], self.text_mask[place] = self.empty_text, self.empty_mask
            self.pooled[place] = self.empty_pooled


def new_batch(store: RowStore, bucket: Bucket, size: int, weight: float) -> MicroBatch:
    """Return a batch with room for ``size`` samples of ``store``, to be filled in place."""
    if isinstance(store, OwnBatches):
        return store.empty_batch(bucket, size, weight)
    return empty_batch(cast(SampleStore, store), bucket, size, weight)


def bytes_of_batch(store: RowStore, bucket: Bucket, size: int) -> int:
    """Return the memory of a batch of ``store``, but for its names."""
    if isinstance(store, OwnBatches):
        return store.batch_bytes(bucket, size)
    return batch_bytes(store.meta, bucket, size)


def check_any(store: RowStore, sample: Any, row: SampleRow) -> None:
    """Check that a sample of ``store`` has the shapes of its bucket.

    Raises:
        SampleError: It does not; says which and how.
    """
    if isinstance(store, OwnBatches):
        store.check(sample, row)
    else:
        check_sample(sample, row, store.meta)


def empty_batch(store: SampleStore, bucket: Bucket, size: int, weight: float) -> Batch:
    """Return a batch with room for ``size`` samples of ``store``, to be filled in place.

    Padded states of a real text encoder are 4 MiB per caption, so they are made once.
    """
    meta, latents = store.meta, (size, store.meta.latent_channels, *bucket.latent_shape)
    empty = store.empty(bucket.media)
    empty_text = torch.zeros(meta.text_length, meta.text_dim)
    empty_text[: len(empty.states)] = empty.states
    stills = (size, *_stills_shape(meta, bucket))
    return Batch(
        bucket=bucket,
        weight=weight,
        sample_ids=[""] * size,
        epochs=[0] * size,
        mean=torch.zeros(latents),
        std=torch.zeros(latents),
        stills=torch.zeros(stills) if 0 not in stills else None,
        still_frames=meta.condition_frames if 0 not in stills else [],
        text=torch.zeros(size, meta.text_length, meta.text_dim),
        text_mask=torch.zeros(size, meta.text_length, dtype=torch.bool),
        pooled=torch.zeros(size, meta.pooled_dim),
        empty_text=empty_text,
        empty_mask=torch.arange(meta.text_length) < len(empty.states),
        empty_pooled=empty.pooled,
        captions=[""] * size,
        source=store.name,
    )


def batch_bytes(meta: StoreMeta, bucket: Bucket, size: int) -> int:
    """Return the memory of a batch, but for its names."""
    frames, height, width = bucket.latent_shape
    latents = 2 * meta.latent_channels * (frames + meta.num_stills(bucket)) * height * width
    return 4 * (size * (latents + meta.pooled_dim) + (size + 1) * meta.text_length * meta.text_dim)


def choose_caption(row: SampleRow, seed: int, epoch: int) -> int:
    """Draw which of its captions a sample has in an epoch, on every rank alike."""
    if len(row.texts) == 1:
        return 0
    return int(keyed_generator(seed, "caption", row.sample_id, epoch).integers(len(row.texts)))


def check_sample(sample: Sample, row: SampleRow, meta: StoreMeta) -> None:
    """Check that a sample has the shapes of its bucket and of its store.

    Raises:
        SampleError: It does not; says which and how.
    """
    latents = (meta.latent_channels, *row.bucket.latent_shape)
    for name, tensor in (("mean", sample.mean), ("std", sample.std)):
        if tuple(tensor.shape) != latents:
            raise _misshapen(row, name, tensor, f"{list(latents)} in bucket {row.bucket}")
    alone = _stills_shape(meta, row.bucket)
    if 0 not in alone and (sample.stills is None or tuple(sample.stills.shape) != alone):
        found = torch.empty(0) if sample.stills is None else sample.stills
        raise _misshapen(row, "block of frames encoded alone", found, str(list(alone)))
    text: Text = sample.text
    tokens, *width = text.states.shape
    if width != [meta.text_dim] or not 0 < tokens <= meta.text_length:
        wanted = f"[1 to {meta.text_length}, {meta.text_dim}]"
        raise _misshapen(row, "text states", text.states, wanted)
    if tuple(text.pooled.shape) != (meta.pooled_dim,):
        raise _misshapen(row, "pooled text", text.pooled, f"[{meta.pooled_dim}]")


def _stills_shape(meta: StoreMeta, bucket: Bucket) -> tuple[int, ...]:
    return (2, meta.latent_channels, meta.num_stills(bucket), *bucket.latent_shape[1:])


def _misshapen(row: SampleRow, name: str, tensor: Tensor, wanted: str) -> SampleError:
    detail = f"its {name} has shape {list(tensor.shape)} instead of {wanted}"
    return SampleError(row.sample_id, Reason.damaged, detail)

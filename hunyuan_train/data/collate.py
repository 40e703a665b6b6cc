"""Samples of one bucket stacked into a micro-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.index import LatentStore, SampleRow


@dataclass(kw_only=True, slots=True)
class Batch:
    """One micro-batch on the CPU; latents are unscaled posterior moments, to be sampled anew."""

    bucket: Bucket
    sample_ids: list[str]
    epochs: list[int]
    mean: Tensor
    """[B, C, T, h, w] float32."""
    std: Tensor
    """[B, C, T, h, w] float32."""
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


def collate(store: LatentStore, rows: list[SampleRow], epoch: int) -> Batch:
    """Read ``rows``, all of one bucket, from ``store`` and stack them."""
    bucket = rows[0].bucket
    assert all(row.bucket == bucket for row in rows), "a micro-batch has one bucket"
    latents = [store.latents(row) for row in rows]
    texts = [store.text(row) for row in rows]
    # Filled in place: padded float32 states of a real encoder are 4 MiB per caption.
    text = torch.zeros(len(rows), store.meta.text_length, store.meta.text_dim)
    lengths = torch.tensor([len(states) for states, _ in texts])
    for place, (states, _) in zip(text, texts, strict=True):
        place[: len(states)] = states
    empty = store.empty(bucket.media)
    return Batch(
        bucket=bucket,
        sample_ids=[row.sample_id for row in rows],
        epochs=[epoch] * len(rows),
        mean=torch.stack([mean for mean, _ in latents]),
        std=torch.stack([std for _, std in latents]),
        text=text,
        text_mask=torch.arange(store.meta.text_length) < lengths[:, None],
        pooled=torch.stack([pooled for _, pooled in texts]),
        empty_text=empty["states"],
        empty_mask=empty["mask"],
        empty_pooled=empty["pooled"],
        captions=[row.caption for row in rows],
    )

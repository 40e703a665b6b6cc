"""Samples by row number: the protocol that training reads, and the store that precompute writes."""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol, Self

import torch
import xxhash
from torch import Tensor

from hunyuan_train.data.blobs import Blobs, open_blobs, read_whole
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.buffers import Buffers
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import FIX, FORMAT, Blob, Index
from hunyuan_train.data.index_cache import cache_folder, copy_index
from hunyuan_train.data.parts import PARTS
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.stills import num_stills

META = "meta.json"
_CHECKED_LOCAL = 10_000
_CHECKED_REMOTE = 8


@dataclass(kw_only=True, slots=True)
class Text:
    """Features of one caption."""

    states: Tensor
    """float32 [tokens, D], not padded."""
    pooled: Tensor
    """float32 [P]."""


@dataclass(kw_only=True, slots=True)
class Sample:
    """One sample on the CPU; the tensors are the caller's own."""

    mean: Tensor
    """float32 [C, T, h, w], unscaled posterior mean of the latents."""
    std: Tensor
    """float32 [C, T, h, w]."""
    text: Text
    stills: Tensor | None = None
    """float32 [2, C, K, h, w], mean and std of K frames encoded alone; None if K is 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreMeta:
    """What a store was made with."""

    format: int
    index: str
    """Folder name of the index."""
    storage_dtype: str
    """Number format of the stored tensors."""
    latent_channels: int
    text_length: int
    text_dim: int
    pooled_dim: int
    vae_fingerprint: str
    scaling_factor: float
    """What the unscaled latents are multiplied with before the diffusion model sees them."""
    text_fingerprint: str
    config_hash: str
    """Hash of every setting that changes the stored numbers."""
    empty_texts: dict[str, dict[str, Any]]
    """The empty caption, by media: ``{"shard", "offset", "nbytes", "digest", "tokens"}``."""
    condition_frames: list[str] = field(default_factory=list)
    """Names of the frames of every clip that were also encoded alone."""
    text_images: bool = False
    """Whether the text features of a clip depend on its first frame too."""

    def num_stills(self, bucket: Bucket) -> int:
        """Return how many frames of a sample in ``bucket`` were encoded alone."""
        return num_stills(self.condition_frames, bucket.frames)


class RowStore(Protocol):
    """What planner and loader need of a store, whatever its samples are made of."""

    name: str
    """Key in data.sources; empty for a single store."""
    meta: StoreMeta
    index: Index


class SampleStore(RowStore, Protocol):
    """A store of latents and text; safe to use from several threads."""

    def load(self, number: int, variant: int) -> Sample:
        """Read row ``number`` with its caption ``variant``, counted from 0.

        Raises:
            SampleError: This sample cannot be used; it says why.
        """
        ...

    def empty(self, media: str) -> Text:
        """Read the features of the empty caption of ``image`` or ``video``; not to be changed."""
        ...


class LatentStore:
    """A precomputed store in a local folder or at a URL; see :class:`SampleStore`.

    Args:
        location: Folder or URL.
        blobs: Its files.
        meta: Its ``meta.json``.
        index: Its index, open.
        cfg: ``verify`` is what matters here.
        name: Key in data.sources.
    """

    def __init__(
        self,
        location: str,
        blobs: Blobs,
        meta: StoreMeta,
        index: Index,
        cfg: DataConfig,
        name: str = "",
    ) -> None:
        self.name = name
        self.location = location
        self.meta = meta
        self.index = index
        self._blobs = blobs
        self._verify = cfg.verify
        self._dtype: torch.dtype = getattr(torch, meta.storage_dtype)
        self._buffers = Buffers(keep=cfg.workers)
        self._empty: dict[str, Text] = {}

    @classmethod
    def open(cls, location: str | Path, cfg: DataConfig, name: str = "") -> Self:
        """Open the store in a folder or at a URL, reading nothing that grows with its rows.

        Args:
            location: Folder, or a URL such as ``s3://bucket/store``, whose index is copied into
                ``cfg.local_cache`` once.
            cfg: ``verify``, ``retries`` and ``local_cache`` are what matters here.
            name: Key in data.sources.

        Raises:
            ValueError: There is no store, or it is incomplete, of another format, or its index does
                not belong to its shards; the message names the file and the fix.
        """
        if not str(location):
            raise ValueError("data.latents is empty; set it to the folder that precompute wrote")
        blobs = open_blobs(location, cfg.retries)
        meta = _read_meta(blobs)
        if blobs.local:
            index = Index.open(Path(blobs.where(meta.index)))
        else:
            index = Index.open(copy_index(blobs, meta.index, cache_folder(cfg.local_cache)))
        _check_shards(blobs, index)
        return cls(str(location), blobs, meta, index, cfg, name)

    def load(self, number: int, variant: int) -> Sample:
        """Read one sample; see :meth:`SampleStore.load`."""
        row = self.index.row(number)
        frames, *area = row.bucket.latent_shape
        whole = (2, self.meta.latent_channels, frames, *area)
        alone = (2, self.meta.latent_channels, self.meta.num_stills(row.bucket), *area)
        sizes = [math.prod(whole), math.prod(alone)]
        clip, stills = self._read(row.sample_id, row.latents, sum(sizes)).split(sizes)
        mean, std = clip.view(whole)
        text = row.texts[variant]
        return Sample(
            mean=mean,
            std=std,
            text=self._text(row.sample_id, text.blob, text.tokens),
            stills=stills.view(alone) if sizes[1] else None,
        )

    def empty(self, media: str) -> Text:
        """Read the features of the empty caption; see :meth:`SampleStore.empty`.

        Raises:
            ValueError: They are missing or damaged.
        """
        if media not in self._empty:
            entry = dict(self.meta.empty_texts[media])
            tokens = entry.pop("tokens")
            try:
                self._empty[media] = self._text("the empty caption", Blob(**entry), tokens)
            except SampleError as error:
                raise ValueError(f"{error}; {FIX}") from error
        return self._empty[media]

    def _text(self, sample_id: str, blob: Blob, tokens: int) -> Text:
        width, dim = self.meta.pooled_dim, self.meta.text_dim
        values = self._read(sample_id, blob, width + tokens * dim)
        return Text(pooled=values[:width], states=values[width:].view(tokens, dim))

    def _read(self, sample_id: str, blob: Blob, count: int) -> Tensor:
        """Read ``count`` stored numbers as float32, checking digest and finiteness on the way."""

        def bad(reason: Reason, why: str) -> SampleError:
            path = self._blobs.where(shard_file(blob.shard))
            end = blob.offset + blob.nbytes
            return SampleError(sample_id, reason, f"{path} bytes {blob.offset}-{end}: {why}")

        if blob.nbytes != count * self._dtype.itemsize:
            raise bad(Reason.unreadable, f"they are not {count} numbers of {self._dtype}")
        values = self._buffers.take(count)
        digest = xxhash.xxh3_64()
        total, place = 0.0, 0
        try:
            for piece in self._blobs.pieces(shard_file(blob.shard), blob.offset, blob.nbytes):
                if self._verify:
                    digest.update(piece)
                stored = torch.frombuffer(piece, dtype=self._dtype)
                part = values[place : place + len(stored)].copy_(stored)
                total += float(part.sum())
                place += len(stored)
        except FileNotFoundError as error:
            raise bad(Reason.missing, "the file does not exist") from error
        except OSError as error:
            raise bad(Reason.unreadable, str(error)) from error
        if self._verify and digest.intdigest() != blob.digest:
            raise bad(Reason.checksum, "they are not what precompute wrote")
        # A sum is finite only if all of its terms are; only a huge one is worth a second look.
        if not math.isfinite(total) and not bool(values.isfinite().all()):
            raise bad(Reason.not_finite, "they hold NaN or infinity")
        return values


def shard_file(name: str) -> str:
    """Return the path of a shard below its store."""
    return f"{PARTS}/{name}.safetensors"


def _read_meta(blobs: Blobs) -> StoreMeta:
    path = blobs.where(META)
    try:
        raw = json.loads(read_whole(blobs, META))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: no latent store there; {FIX}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {FIX}") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} has store format {found}, this is {FORMAT}; {FIX}")
    raw.setdefault("condition_frames", [])  # a store from before there were any
    differing = {field.name for field in fields(StoreMeta)} ^ set(raw)
    if differing:
        raise ValueError(f"{path} comes from another version (field {min(differing)}); {FIX}")
    return StoreMeta(**raw)


def _check_shards(blobs: Blobs, index: Index) -> None:
    """Compare the sizes of shards with the ranges in the index, up to a number of them.

    Beyond it, a shard that is missing or short is found when a sample is read from it.
    """
    for number in range(min(index.num_shards, _CHECKED_LOCAL if blobs.local else _CHECKED_REMOTE)):
        name, needed = index.shard(number)
        path = blobs.where(shard_file(name))
        try:
            found = blobs.size(shard_file(name))
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing from the store; {FIX}") from error
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if found < needed:
            raise ValueError(
                f"{path} has {found} bytes, but the index has samples up to byte {needed} of it; "
                f"{FIX}"
            )

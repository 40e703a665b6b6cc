"""Finished samples by row: from the encoders' cache, or from a store that precompute has filled."""

import hashlib
import math
import os
import time
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import SampleRow
from hunyuan_train.data.parts import PARTS, PartStore, key_of
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.service_cache import Cache
from hunyuan_train.data.store import Sample, StoreMeta, Text, shard_file

FOLDER = "service"
_RACY_NS = 2_000_000_000
"""A file changed this shortly before it was hashed may change again within one clock tick."""


class Keys(Protocol):
    """How precompute names what encoders make."""

    def source(self, digest: str, suffix: str) -> str:
        """Name the latents of a file by the SHA-256 of its bytes and its suffix."""
        ...

    def text(self, caption: str, media: str) -> str:
        """Name the features of a caption."""
        ...


def service_folder(cfg: DataConfig) -> Path:
    """Return the folder that encoders and ranks share."""
    return Path(cfg.service.folder) if cfg.service.folder else Path(cfg.latents) / FOLDER


class Library:
    """What need not be encoded again.

    Args:
        cfg: Source, latents, cache.
        keys: Names of entries.
        meta: Of the samples.
        root: Folder of the source files.
        parts: Look into the store of precompute too; its lists are held in memory.
    """

    def __init__(
        self, cfg: DataConfig, keys: Keys, meta: StoreMeta, root: Path, *, parts: bool
    ) -> None:
        folder = service_folder(cfg)
        self.cache = Cache(folder / "cache", int(cfg.service.cache_gib * 2**30))
        self._keys = keys
        self._meta = meta
        self._root = root
        self._dtype: torch.dtype = getattr(torch, str(cfg.storage_dtype))
        self._parts: PartStore | None = None
        self._latents = Path(cfg.latents)
        if parts and (self._latents / PARTS).is_dir():
            self._parts = PartStore(self._latents)
            self._parts.refresh()
        self.useful = bool(cfg.service.cache_gib) or self._parts is not None

    def sample(self, row: SampleRow, variant: int, *, read: bool) -> Sample | None:
        """Return a sample of which all is there, in float32."""
        moments, text = self.moments(row, read=read), self.text(row, variant)
        return self.joined(moments, text) if moments is not None and text is not None else None

    def joined(self, moments: dict[str, Tensor], text: Text) -> Sample:
        """Return a sample, in float32, of its latents and its text."""
        stills = moments.get("stills")
        return Sample(
            mean=moments["mean"].float(),
            std=moments["std"].float(),
            text=text,
            stills=None if stills is None else stills.float(),
        )

    def moments(self, row: SampleRow, *, read: bool) -> dict[str, Tensor] | None:
        """Return ``mean``, ``std`` and perhaps ``stills`` of a row, None if they are not there.

        Args:
            row: The row.
            read: Read the file if its digest is not known; without it, that is a miss.
        """
        key = self.source_key(row, read=read)
        if key is None:
            return None
        found = self.cache.get(_row_key(key, row))
        return found if found is not None else self._stored_moments(key, row)

    def text(self, row: SampleRow, variant: int) -> Text | None:
        """Return the features of a caption of a row, in float32, None if they are not there."""
        key = self._keys.text(row.texts[variant].caption, row.media)
        found = self.cache.get(key)
        if found is None:
            found = self._stored_text(key)
        if found is None:
            return None
        return Text(states=found["states"].float(), pooled=found["pooled"].float())

    def keep(self, key: str | None, row: SampleRow, variant: int, made: dict[str, Tensor]) -> None:
        """Put what was made of a row and of one of its captions into the cache.

        Args:
            key: What :meth:`source_key` said before the file was decoded; if the file has another
                now, its latents may be of either content and are not kept.
            row: The row.
            variant: The caption.
            made: Latents and features of the caption.
        """
        if key is not None and key == self.source_key(row, read=True):
            moments = {name: made[name] for name in MOMENTS if name in made}
            self.cache.put(_row_key(key, row), moments)
        self.keep_text(row, variant, made)

    def keep_text(self, row: SampleRow, variant: int, tensors: dict[str, Tensor]) -> None:
        """Put the features of a caption into the cache."""
        key = self._keys.text(row.texts[variant].caption, row.media)
        self.cache.put(key, {name: tensors[name] for name in ("pooled", "states")})

    def source_key(self, row: SampleRow, *, read: bool) -> str | None:
        """Return the name of the latents of a row's file, None if it cannot be known.

        Args:
            row: The row.
            read: Read the file if its digest is not known.
        """
        if not self.useful:
            return None
        path = self._root / row.source
        try:
            stat = path.stat()
            digest = self._digest(row.source, stat)
            if digest is None:
                if not read:
                    return None
                digest = self._hash(path, row.source, stat)
        except OSError:  # decoding says what is wrong
            return None
        return self._keys.source(digest, path.suffix.lower())

    def _digest(self, source: str, stat: os.stat_result) -> str | None:
        """Return the digest of a file that is as it was when it was read; None: it never was."""
        found = self.cache.noted(_stamp(source, stat))
        if found is None and self._parts is not None:
            known = self._parts.digests.get(source, ("", {}))[1]
            same = (known.get("size"), known.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
            if same and stat.st_mtime_ns + _RACY_NS < known["hashed_ns"]:
                found = known["sha256"]
        return found

    def _hash(self, path: Path, source: str, stat: os.stat_result) -> str:
        now = time.time_ns()
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if stat.st_mtime_ns + _RACY_NS < now:
            self.cache.note(_stamp(source, stat), digest)
        return digest

    def _stored_moments(self, key: str, row: SampleRow) -> dict[str, Tensor] | None:
        part, entry = self._parts.sources.get(key, ("", {})) if self._parts else ("", {})
        place: tuple[str, int] = (str(row.bucket), row.anchor)
        for stored in entry.get("rows", []):
            if (stored["bucket"], stored["anchor"]) == place:
                break
        else:
            return None
        frames, *area = row.bucket.latent_shape
        channels, alone = self._meta.latent_channels, self._meta.num_stills(row.bucket)
        whole, rest = (2, channels, frames, *area), (2, channels, alone, *area)
        sizes = [math.prod(whole), math.prod(rest)]
        values = self._read(part, stored["latents"], sum(sizes))
        if values is None:
            return None
        clip, stills = values.split(sizes)
        mean, std = clip.view(whole)
        moments = {"mean": mean, "std": std}
        return {**moments, "stills": stills.view(rest)} if alone else moments

    def _stored_text(self, key: str) -> dict[str, Tensor] | None:
        if self._parts is None or key not in self._parts.texts:
            return None
        part, entry = self._parts.texts[key]
        width, dim = self._meta.pooled_dim, self._meta.text_dim
        values = self._read(part, entry, width + entry["tokens"] * dim)
        if values is None:
            return None
        return {"pooled": values[:width], "states": values[width:].view(-1, dim)}

    def _read(self, part: str, place: dict[str, Any], count: int) -> Tensor | None:
        """Return stored numbers, None if they are not what precompute wrote."""
        if place["nbytes"] != count * self._dtype.itemsize:
            return None
        try:
            with (self._latents / shard_file(part)).open("rb") as file:
                file.seek(place["offset"])
                raw = bytearray(file.read(place["nbytes"]))
        except OSError:  # pruned meanwhile
            return None
        if xxhash.xxh3_64_intdigest(raw) != place["digest"]:
            return None
        return torch.frombuffer(raw, dtype=self._dtype)


MOMENTS = ("mean", "std", "stills")


def stored_form(
    row: SampleRow, sample: Sample, dtype: torch.dtype
) -> dict[str, Tensor] | SampleError:
    """Return a sample's tensors in the dtype of storage, or why it cannot be used.

    Raises:
        ValueError: The features of its caption are not finite.
    """
    texts = {"pooled": sample.text.pooled.to(dtype), "states": sample.text.states.to(dtype)}
    check_text(row, texts)
    latents = {"mean": sample.mean.to(dtype), "std": sample.std.to(dtype)}
    if sample.stills is not None:
        latents["stills"] = sample.stills.to(dtype)
    if not all(bool(tensor.isfinite().all()) for tensor in latents.values()):
        detail = f"its latents in bucket {row.bucket} are not finite in {dtype}"
        return SampleError(row.sample_id, Reason.not_finite, detail)
    return {**latents, **texts}


def check_text(row: SampleRow, texts: dict[str, Tensor]) -> None:
    """Check that the features of a caption are finite.

    Raises:
        ValueError: They are not.
    """
    if not all(bool(tensor.isfinite().all()) for tensor in texts.values()):
        raise ValueError(
            f"the text features of {row.sample_id} are not finite in {texts['states'].dtype}; set "
            "data.storage_dtype=float32, or check the text encoder's weights"
        )


def _stamp(source: str, stat: os.stat_result) -> str:
    return key_of("digest", source, str(stat.st_size), str(stat.st_mtime_ns))


def _row_key(source_key: str, row: SampleRow) -> str:
    return f"{source_key}-{row.anchor}-{row.bucket}"


def as_sample(tensors: dict[str, Tensor]) -> Sample:
    """Return the sample, in float32, of its tensors in any dtype.

    Raises:
        KeyError: One is missing.
    """
    stills = tensors.get("stills")
    return Sample(
        mean=tensors["mean"].float(),
        std=tensors["std"].float(),
        text=Text(states=tensors["states"].float(), pooled=tensors["pooled"].float()),
        stills=None if stills is None else stills.float(),
    )

"""The index of a store: which samples there are, in groups, and where their bytes lie.

An index is a folder ``index-<digest>`` of a few files::

    header.json   format, counts, the groups, and size and digest of the other files
    rows.bin      one record per sample, sorted by group, then by sample id
    texts.bin     one record per caption of a sample
    shards.bin    one record per tensor file
    strings.bin   UTF-8 of sample ids, captions and shard names

Opening reads the header alone. A row is read in place when it is asked for, with positioned reads
of the few records it needs: memory does not grow with the number of rows, and a file that shrinks
or vanishes under a running job is an error, where a memory map would end the process.
"""

import bisect
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from hunyuan_train.data.blobs import ReadFile
from hunyuan_train.data.buckets import Bucket

FORMAT = 2
FIX = "run `hunyuan-train precompute` again"
ENCODING = ("utf-8", "surrogatepass")
"""Captions and file names may hold halves of surrogate pairs."""
HEADER = "header.json"
FILES = ("rows.bin", "texts.bin", "shards.bin", "strings.bin")


@dataclass(frozen=True, slots=True)
class Blob:
    """A range of bytes in a shard."""

    shard: str
    """File name without folder and suffix."""
    offset: int
    nbytes: int
    digest: int
    """xxh3_64 of the bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRef:
    """One caption of a sample and where its features are: pooled [P], then states [tokens, D]."""

    caption: str
    blob: Blob
    tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRow:
    """One training sample: a bucket of one source, where its tensors are, and how it was made."""

    sample_id: str
    """``<source>@<anchor>:<bucket>``; keys all randomness of the sample."""
    source: str
    """File relative to the source folder."""
    bucket: Bucket
    anchor: int
    concept: str
    """What the manifest calls its concept; empty without one."""
    repeat: int
    """How often an epoch has the sample."""
    fps: float
    """Frames per second of the sample; 0 for images."""
    scale: float
    """Resize factor per side; above 1 the source was enlarged."""
    crop_loss: float
    """Share of the resized picture that the centre crop removed."""
    latents: Blob
    """Mean, then std, each [C, T, h, w]."""
    texts: tuple[TextRef, ...]
    """Its captions, the plain one first."""

    @property
    def media(self) -> str:
        """``image`` for one frame, else ``video``."""
        return self.bucket.media


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Rows ``first`` to ``first + count``, which share concept, bucket, anchor and repeat."""

    concept: str
    bucket: Bucket
    anchor: int
    repeat: int
    first: int
    count: int
    crop_loss: float
    """Mean over its rows."""
    tokens_of_text: float
    """Mean over its rows of the tokens of the first caption."""


ROW = np.dtype(
    [
        ("latents_offset", "<u8"),
        ("latents_nbytes", "<u8"),
        ("latents_digest", "<u8"),
        ("id_offset", "<u8"),  # into strings.bin; the sample id begins with the source
        ("first_text", "<u8"),
        ("fps", "<f8"),
        ("scale", "<f8"),
        ("crop_loss", "<f8"),
        ("shard", "<u4"),
        ("id_nbytes", "<u4"),
        ("source_nbytes", "<u4"),
        ("texts", "<u4"),
    ]
)
TEXT = np.dtype(
    [
        ("caption_offset", "<u8"),
        ("offset", "<u8"),
        ("nbytes", "<u8"),
        ("digest", "<u8"),
        ("caption_nbytes", "<u4"),
        ("tokens", "<u4"),
        ("shard", "<u4"),
        ("unused", "<u4"),
    ]
)
SHARD = np.dtype(
    [("name_offset", "<u8"), ("nbytes", "<u8"), ("name_nbytes", "<u4"), ("unused", "<u4")]
)


class Index:
    """An open index; safe to use from several threads.

    Args:
        folder: Its local folder.
        header: Its ``header.json``.
    """

    def __init__(self, folder: Path, header: dict[str, Any]) -> None:
        self.folder = folder
        self.groups: list[Group] = [
            Group(**{**group, "bucket": Bucket.parse(group["bucket"])})
            for group in header["groups"]
        ]
        self.num_shards: int = header["shards"]
        self._firsts = [group.first for group in self.groups]
        self._rows: int = header["rows"]
        self._files = {name: ReadFile(folder / name) for name in FILES}

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Open the index in a local folder, reading only its header.

        Raises:
            ValueError: It is missing, incomplete or of another format; says which file.
        """
        path = folder / HEADER
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"{path} cannot be read ({error.strerror}); {FIX}") from error
        digest = digest_of_header(text)
        if folder.name != digest:
            raise ValueError(f"{path} is damaged: it belongs to {digest}; {FIX}")
        header = json.loads(text)
        for name in FILES:
            expected = header["files"][name]["nbytes"]
            try:
                found = (folder / name).stat().st_size
            except OSError as error:
                raise ValueError(f"{folder / name} is missing from the index; {FIX}") from error
            if found != expected:
                raise ValueError(
                    f"{folder / name} has {found} bytes where its header says {expected}; {FIX}"
                )
        return cls(folder, header)

    def __len__(self) -> int:
        """Return the number of samples."""
        return self._rows

    def group_of(self, number: int) -> Group:
        """Return the group that row ``number`` is in."""
        return self.groups[bisect.bisect_right(self._firsts, number) - 1]

    def row(self, number: int) -> SampleRow:
        """Read one row.

        Raises:
            IndexError: There is no such row.
            OSError: The index cannot be read any more.
        """
        if not 0 <= number < self._rows:
            raise IndexError(f"row {number} of an index of {self._rows}")
        # In the order of ROW.
        offset, nbytes, digest, id_offset, first_text, fps, scale, crop_loss, shard, *sizes = (
            self._records("rows.bin", ROW, number, 1)[0]
        )
        id_nbytes, source_nbytes, num_texts = sizes
        name = self._files["strings.bin"].read(id_offset, id_nbytes)
        group = self.group_of(number)
        return SampleRow(
            sample_id=name.decode(*ENCODING),
            source=name[:source_nbytes].decode(*ENCODING),
            bucket=group.bucket,
            anchor=group.anchor,
            concept=group.concept,
            repeat=group.repeat,
            fps=fps,
            scale=scale,
            crop_loss=crop_loss,
            latents=Blob(self.shard(shard)[0], offset, nbytes, digest),
            texts=tuple(
                TextRef(
                    caption=self._string(caption_offset, caption_nbytes),
                    blob=Blob(self.shard(shard)[0], offset, nbytes, digest),
                    tokens=tokens,
                )
                for caption_offset, offset, nbytes, digest, caption_nbytes, tokens, shard, _ in (
                    self._records("texts.bin", TEXT, first_text, num_texts)
                )
            ),
        )

    def shard(self, number: int) -> tuple[str, int]:
        """Return the name of a shard, and the bytes that it must have at least."""
        offset, nbytes, name_nbytes, _ = self._records("shards.bin", SHARD, number, 1)[0]
        return self._string(offset, name_nbytes), nbytes

    def _records(self, name: str, dtype: np.dtype, first: int, count: int) -> list[Any]:
        size = dtype.itemsize
        return np.frombuffer(self._files[name].read(first * size, count * size), dtype).tolist()

    def _string(self, offset: int, nbytes: int) -> str:
        return self._files["strings.bin"].read(offset, nbytes).decode(*ENCODING)


def digest_of_header(text: str) -> str:
    """Return the folder name of the index with this header."""
    return f"index-{hashlib.sha256(text.encode()).hexdigest()[:20]}"

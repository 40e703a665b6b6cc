"""Writing an index: complete or not at all, in one pass over sorted rows."""

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
import xxhash

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.index import (
    ENCODING,
    FILES,
    FORMAT,
    HEADER,
    ROW,
    SHARD,
    TEXT,
    Blob,
    Index,
    SampleRow,
    digest_of_header,
)

_CHUNK = 8192


class IndexWriter:
    """Writes an index into a store; leaving the ``with`` block without :meth:`finish` drops it.

    Call :meth:`group` for every group in order, and :meth:`append` for its rows in order.

    Args:
        store: Folder in which the index folder appears.
    """

    def __init__(self, store: Path) -> None:
        self._store = store
        self._folder = store / f".index-{uuid.uuid4().hex[:8]}.tmp"
        self._files: dict[str, _HashedFile] = {}
        self._groups: list[dict[str, Any]] = []
        self._shards: dict[str, tuple[int, int]] = {}  # name -> (number, bytes)

    def __enter__(self) -> Self:
        """Open the files."""
        self._folder.mkdir(parents=True)
        self._files = {name: _HashedFile(self._folder / name) for name in FILES}
        return self

    def __exit__(self, *_: object) -> None:
        """Drop what was not finished."""
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def shard(self, name: str, nbytes: int) -> int:
        """Return the number of a shard, of which at least ``nbytes`` bytes are needed."""
        number, known = self._shards.get(name, (len(self._shards), 0))
        self._shards[name] = (number, max(known, nbytes))
        return number

    def group(self, concept: str, bucket: Bucket, anchor: int, repeat: int) -> None:
        """Begin the next group."""
        self._groups.append(
            {
                "concept": concept,
                "bucket": str(bucket),
                "anchor": anchor,
                "repeat": repeat,
                "first": self._rows,
                "count": 0,
                "crop_loss": 0.0,
                "tokens_of_text": 0.0,
            }
        )

    def append(self, rows: np.ndarray, texts: np.ndarray, strings: bytes) -> None:
        """Append rows to the group.

        Args:
            rows: :data:`ROW` records; ``first_text`` counts in ``texts``, offsets in ``strings``.
            texts: :data:`TEXT` records.
            strings: What the records' strings are taken from.
        """
        group = self._groups[-1]
        group["count"] += len(rows)
        group["crop_loss"] += float(rows["crop_loss"].sum())
        group["tokens_of_text"] += float(texts["tokens"][rows["first_text"]].sum())
        rows, texts = rows.copy(), texts.copy()
        rows["first_text"] += np.uint64(self._files["texts.bin"].nbytes // TEXT.itemsize)
        rows["id_offset"] += np.uint64(self._files["strings.bin"].nbytes)
        texts["caption_offset"] += np.uint64(self._files["strings.bin"].nbytes)
        for name, data in zip(FILES, (rows, texts, b"", strings), strict=True):
            self._files[name].write(data)

    def finish(self) -> str:
        """Write the header, move the folder to its place and return its name.

        Raises:
            OSError: The disk is full or cannot be written; the index does not exist then.
        """
        self._write_shards()
        for group in self._groups:
            group["crop_loss"] /= max(1, group["count"])
            group["tokens_of_text"] /= max(1, group["count"])
        header = {
            "format": FORMAT,
            "rows": self._rows,
            "shards": len(self._shards),
            "groups": self._groups,
            "files": {name: file.finish() for name, file in self._files.items()},
        }
        text = json.dumps(header, ensure_ascii=True, indent=1) + "\n"
        with (self._folder / HEADER).open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        name = digest_of_header(text)
        target = self._store / name
        try:
            Index.open(target)  # the same content; a reader may be using it
        except ValueError:
            shutil.rmtree(target, ignore_errors=True)
            self._folder.rename(target)
        return name

    @property
    def _rows(self) -> int:
        return self._files["rows.bin"].nbytes // ROW.itemsize

    def _write_shards(self) -> None:
        records = np.zeros(len(self._shards), SHARD)
        for number, (name, (_, nbytes)) in enumerate(self._shards.items()):
            text = name.encode(*ENCODING)
            records[number] = (self._files["strings.bin"].nbytes, nbytes, len(text), 0)
            self._files["strings.bin"].write(text)
        self._files["shards.bin"].write(records)


def write_index(store: Path, rows: Iterable[SampleRow]) -> str:
    """Write an index of ``rows``, in any order, into a store and return its folder name.

    Raises:
        OSError: The disk is full or cannot be written; the index does not exist then.
    """
    ordered = sorted(rows, key=lambda row: (_group_of(row), row.sample_id))
    with IndexWriter(store) as writer:
        for group, members in groupby(ordered, key=_group_of):
            writer.group(*group)
            for chunk in _chunks(members):
                writer.append(*_records(writer, chunk))
        return writer.finish()


def _group_of(row: SampleRow) -> tuple[str, Bucket, int, int]:
    return row.concept, row.bucket, row.anchor, row.repeat


def _chunks(rows: Iterator[SampleRow]) -> Iterator[list[SampleRow]]:
    while chunk := list(islice(rows, _CHUNK)):
        yield chunk


def _records(writer: IndexWriter, chunk: list[SampleRow]) -> tuple[np.ndarray, np.ndarray, bytes]:
    rows, texts, strings = [], [], bytearray()

    def put(text: str) -> tuple[int, int]:
        data = text.encode(*ENCODING)
        strings.extend(data)
        return len(strings) - len(data), len(data)

    def shard(blob: Blob) -> int:
        return writer.shard(blob.shard, blob.offset + blob.nbytes)

    for row in chunk:
        assert row.sample_id.startswith(row.source), "a sample id begins with its source"
        assert row.texts, "a sample has a caption"
        offset, nbytes = put(row.sample_id)
        blob = row.latents
        rows.append(
            (
                *(blob.offset, blob.nbytes, blob.digest, offset, len(texts)),
                *(row.fps, row.scale, row.crop_loss),
                *(shard(blob), nbytes, len(row.source.encode(*ENCODING)), len(row.texts)),
            )
        )
        for text in row.texts:
            offset, nbytes = put(text.caption)
            blob = text.blob
            texts.append(
                (
                    *(offset, blob.offset, blob.nbytes, blob.digest),
                    *(nbytes, text.tokens, shard(blob), 0),
                )
            )
    return np.array(rows, ROW), np.array(texts, TEXT), bytes(strings)


class _HashedFile:
    """A new file whose digest is known when it is written."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._digest = xxhash.xxh3_128()
        self.nbytes = 0

    def write(self, data: np.ndarray | bytes) -> None:
        data = data if isinstance(data, bytes) else data.tobytes()
        self._file.write(data)
        self._digest.update(data)
        self.nbytes += len(data)

    def finish(self) -> dict[str, Any]:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return {"nbytes": self.nbytes, "xxh3_128": self._digest.hexdigest()}

    def close(self) -> None:
        self._file.close()

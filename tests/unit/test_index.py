import gc
import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.data.blobs import ReadFile
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.index import FILES, Blob, Index, SampleRow, TextRef
from hunyuan_train.data.index_writer import IndexWriter, write_index


def make_row(number: int, **changes) -> SampleRow:
    bucket = changes.pop("bucket", Bucket(1, 64, 64))
    anchor = changes.pop("anchor", 64)
    source = f"clips/{number:04d}.mp4"
    defaults = {
        "sample_id": f"{source}@{anchor}:{bucket}",
        "source": source,
        "bucket": bucket,
        "anchor": anchor,
        "concept": "",
        "repeat": 1,
        "fps": 29.97,
        "scale": 0.4213,
        "crop_loss": 0.125,
        "latents": Blob("part-a", 100 * number, 100, 2**64 - 1 - number),
        "texts": (TextRef(caption=f"clip {number}", blob=Blob("part-b", 7, 9, 5), tokens=3),),
    }
    return SampleRow(**{**defaults, **changes})


def read(store: Path, name: str) -> tuple[Index, list[SampleRow]]:
    index = Index.open(store / name)
    return index, [index.row(number) for number in range(len(index))]


buckets = st.builds(
    Bucket, st.sampled_from([1, 5, 17]), st.sampled_from([16, 64]), st.sampled_from([32, 48])
)
strings = st.text(max_size=12)  # any code points, halves of surrogate pairs too
blobs = st.builds(
    Blob,
    st.sampled_from(["a", "b", "c"]),
    st.integers(0, 2**40),
    st.integers(0, 2**40),
    st.integers(0, 2**64 - 1),
)
numbers = st.floats(0, 1e4)


@st.composite
def sample_rows(draw: st.DrawFn) -> SampleRow:
    source, bucket, anchor = draw(strings), draw(buckets), draw(st.integers(1, 4096))
    text = st.builds(TextRef, caption=strings, blob=blobs, tokens=st.integers(1, 256))
    return SampleRow(
        sample_id=f"{source}@{anchor}:{bucket}",
        source=source,
        bucket=bucket,
        anchor=anchor,
        concept=draw(st.sampled_from(["", "cat", "ö\ud800"])),
        repeat=draw(st.integers(1, 3)),
        fps=draw(numbers),
        scale=draw(numbers),
        crop_loss=draw(st.floats(0, 1)),
        latents=draw(blobs),
        texts=tuple(draw(st.lists(text, min_size=1, max_size=3))),
    )


def order(row: SampleRow) -> tuple:
    return row.concept, row.bucket, row.anchor, row.repeat, row.sample_id


@settings(max_examples=60, deadline=None)
@given(st.lists(sample_rows(), max_size=12, unique_by=order))
def test_rows_and_groups_come_back(tmp_path_factory, rows):
    store = tmp_path_factory.mktemp("store")
    index, found = read(store, write_index(store, rows))
    assert found == sorted(rows, key=order)
    covered = 0
    for group in index.groups:
        members = found[group.first : group.first + group.count]
        assert group.first == covered
        covered += len(members)
        keys = {(row.concept, row.bucket, row.anchor, row.repeat) for row in members}
        assert keys == {(group.concept, group.bucket, group.anchor, group.repeat)}
        loss = sum(row.crop_loss for row in members) / len(members)
        assert group.crop_loss == pytest.approx(loss)
        tokens = sum(row.texts[0].tokens for row in members) / len(members)
        assert group.tokens_of_text == pytest.approx(tokens)
    assert covered == len(index) == len(rows)
    shards: dict[str, int] = {}
    for row in rows:
        for blob in (row.latents, *(text.blob for text in row.texts)):
            shards[blob.shard] = max(shards.get(blob.shard, 0), blob.offset + blob.nbytes)
    assert dict(index.shard(number) for number in range(index.num_shards)) == shards


def test_chunks_are_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("hunyuan_train.data.index_writer._CHUNK", 3)
    rows = [make_row(number, repeat=1 + number % 2) for number in range(20)]
    _, found = read(tmp_path, write_index(tmp_path, rows))
    assert found == sorted(rows, key=order)


def test_order_and_name_depend_on_content_only(tmp_path):
    rows = [make_row(number, concept="ab"[number % 2]) for number in range(9)]
    first = write_index(tmp_path, rows)
    assert write_index(tmp_path, rows[::-1]) == first
    assert write_index(tmp_path, rows[1:]) != first
    assert sorted(path.name for path in tmp_path.iterdir() if path.name == first) == [first]


def test_row_numbers_outside_are_refused(tmp_path):
    index, _ = read(tmp_path, write_index(tmp_path, [make_row(0)]))
    for number in (-1, 1):
        with pytest.raises(IndexError):
            index.row(number)


def test_no_rows(tmp_path):
    index, found = read(tmp_path, write_index(tmp_path, []))
    assert (found, index.groups, len(index)) == ([], [], 0)


@pytest.fixture
def reads(monkeypatch) -> list[int]:
    """Sizes of the reads by position."""
    seen: list[int] = []
    original = ReadFile.read

    def counting(self: ReadFile, offset: int, nbytes: int) -> bytes:
        seen.append(nbytes)
        return original(self, offset, nbytes)

    monkeypatch.setattr(ReadFile, "read", counting)
    return seen


def test_opening_reads_nothing_of_the_rows(tmp_path, reads):
    headers = []
    for count in (10, 5000):
        store = tmp_path / str(count)
        store.mkdir()
        name = write_index(store, [make_row(number) for number in range(count)])
        reads.clear()
        index = Index.open(store / name)
        assert reads == []
        headers.append((store / name / "header.json").stat().st_size)
        row = index.row(count - 1)
        assert row == make_row(count - 1)
        assert sum(reads) < 500
    assert headers[1] - headers[0] < 50


def test_failed_writing_leaves_no_index(tmp_path):
    def fail() -> None:
        with IndexWriter(tmp_path) as writer:
            writer.group("", Bucket(1, 64, 64), 64, 1)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_index_of_the_same_name_is_replaced(tmp_path):
    name = write_index(tmp_path, [make_row(0)])
    os.truncate(tmp_path / name / "rows.bin", 5)
    assert write_index(tmp_path, [make_row(0)]) == name
    assert read(tmp_path, name)[1] == [make_row(0)]


@pytest.mark.parametrize("file", FILES)
def test_truncated_and_missing_files_are_named(tmp_path, file):
    folder = tmp_path / write_index(tmp_path, [make_row(0), make_row(1)])
    size = (folder / file).stat().st_size
    os.truncate(folder / file, size - 1)
    with pytest.raises(ValueError, match=rf"{file} has {size - 1} bytes where its header says"):
        Index.open(folder)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"{file} is missing from the index; run `hunyuan-train"):
        Index.open(folder)


def test_changed_header_is_refused(tmp_path):
    folder = tmp_path / write_index(tmp_path, [make_row(0)])
    header = json.loads((folder / "header.json").read_text())
    (folder / "header.json").write_text(json.dumps({**header, "rows": 2}))
    with pytest.raises(ValueError, match=r"header.json is damaged: it belongs to index-"):
        Index.open(folder)
    (folder / "header.json").unlink()
    with pytest.raises(ValueError, match=r"header.json cannot be read"):
        Index.open(folder)


def test_an_index_that_shrinks_while_it_is_open_is_an_error(tmp_path):
    folder = tmp_path / write_index(tmp_path, [make_row(number) for number in range(100)])
    index = Index.open(folder)
    os.truncate(folder / "rows.bin", 80)
    assert index.row(0) == make_row(0)
    with pytest.raises(OSError, match=r"rows.bin ends at byte"):
        index.row(99)


def test_files_are_closed_with_the_index(tmp_path):
    folder = tmp_path / write_index(tmp_path, [make_row(0)])
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    index = Index.open(folder)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + len(FILES)
    del index
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == before

import gc
import logging
import os
import threading
from collections import Counter
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from hunyuan_train.data.blobs import PIECE, Blobs, LocalBlobs, RemoteBlobs, open_blobs


def read(blobs: Blobs, name: str, offset: int, nbytes: int) -> bytes:
    return b"".join(bytes(piece) for piece in blobs.pieces(name, offset, nbytes))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten files that differ everywhere, of a few pieces each."""
    for number in range(10):
        (tmp_path / f"{number}.bin").write_bytes(content(number))
    return tmp_path


def content(number: int) -> bytes:
    return bytes((place * 7 + number * 13) % 251 for place in range(1000)) * (3 * PIECE // 1000)


class Failing(MemoryFileSystem):
    """Fails a number of times per file, then works."""

    cachable = False
    store = {}  # noqa: RUF012 - the one of this class, not that of all memory file systems

    def __init__(self, failures: int) -> None:
        super().__init__()
        self.failures = failures
        self.requests: Counter[str] = Counter()

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.requests[path] += 1
        if self.requests[path] <= self.failures:
            raise RuntimeError("503 slow down")  # not an OSError: stores raise what they like
        return super().cat_file(path, start, end, **kwargs)


def failing(failures: int, retries: int = 5) -> tuple[RemoteBlobs, Failing, list[float]]:
    filesystem, waits = Failing(failures), []
    filesystem.pipe_file("/box/a.bin", b"0123456789")
    filesystem.pipe_file("/box/b.bin", b"abcdefghij")
    return RemoteBlobs(filesystem, "/box", retries, waits.append), filesystem, waits


@pytest.mark.parametrize(
    ("offset", "nbytes"), [(0, 1), (5, 0), (17, PIECE), (1, 2 * PIECE + 3), (PIECE - 1, 2)]
)
def test_ranges_of_local_files(folder, offset, nbytes):
    expected = content(3)[offset : offset + nbytes]
    assert read(LocalBlobs(folder), "3.bin", offset, nbytes) == expected
    assert read(open_blobs(f"file://{folder}", 0), "3.bin", offset, nbytes) == expected


def test_local_failures_name_the_file(folder):
    blobs = LocalBlobs(folder)
    with pytest.raises(FileNotFoundError):
        read(blobs, "none.bin", 0, 1)
    size = blobs.size("1.bin")
    with pytest.raises(OSError, match=rf"1.bin ends at byte {size}"):
        read(blobs, "1.bin", 1, size)
    os.truncate(folder / "1.bin", 10)  # while it is open
    with pytest.raises(OSError, match=r"1.bin ends at byte 10"):
        read(blobs, "1.bin", 5, 10)
    assert read(blobs, "1.bin", 5, 5) == content(1)[5:10]


def test_few_files_stay_open(folder):
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    blobs = LocalBlobs(folder, max_open=3)
    for number in range(10):
        read(blobs, f"{number}.bin", 0, 10)
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 3


def test_a_file_closes_only_after_its_last_reader(folder):
    blobs = LocalBlobs(folder, max_open=1)
    pieces = blobs.pieces("0.bin", 0, 2 * PIECE)
    head = bytes(next(pieces))
    thread = threading.Thread(target=lambda: read(blobs, "1.bin", 0, 10))  # pushes 0.bin out
    thread.start()
    thread.join()
    assert head + b"".join(map(bytes, pieces)) == content(0)[: 2 * PIECE]


def test_threads_read_what_they_ask_for(folder):
    blobs = LocalBlobs(folder, max_open=2)
    expected = [content(number) for number in range(10)]
    wrong: list[int] = []

    def work(first: int) -> None:
        for turn in range(60):
            number, offset = (first + turn * 3) % 10, turn * 997
            got = read(blobs, f"{number}.bin", offset, PIECE + turn)
            if got != expected[number][offset : offset + PIECE + turn]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_urls():
    MemoryFileSystem().pipe_file("/urls/x/a.bin", b"0123456789")
    blobs = open_blobs("memory://urls/x/", 2)
    assert not blobs.local
    assert read(blobs, "a.bin", 3, 4) == b"3456"
    assert blobs.size("a.bin") == 10
    assert blobs.where("a.bin") == "memory:///urls/x/a.bin"
    with pytest.raises(FileNotFoundError, match=r"memory:///urls/x/none.bin does not exist"):
        read(blobs, "none.bin", 0, 1)
    with pytest.raises(ValueError, match=r"^nonsense://x cannot be opened: "):
        open_blobs("nonsense://x", 2)


def test_a_failing_request_is_repeated_with_growing_waits(caplog):
    blobs, filesystem, waits = failing(2)
    with caplog.at_level(logging.WARNING):
        assert read(blobs, "a.bin", 2, 3) == b"234"
        filesystem.requests.clear()
        assert read(blobs, "a.bin", 2, 3) == b"234"
        assert len(caplog.messages) == 1  # once per file
        assert read(blobs, "b.bin", 0, 1) == b"a"
    assert waits == [0.5, 1.0] * 3
    assert blobs.retried == 6
    assert caplog.messages == [
        f"reading memory:///box/{name}.bin failed (RuntimeError: 503 slow down); trying again "
        "after 0.5 s, up to 5 times"
        for name in "ab"
    ]


def test_a_request_that_keeps_failing_ends_in_one_error():
    blobs, filesystem, waits = failing(99, retries=3)
    with pytest.raises(OSError, match=r"^memory:///box/a.bin cannot be read: .*503.* 4 attempts$"):
        read(blobs, "a.bin", 0, 1)
    assert filesystem.requests["/box/a.bin"] == 4
    assert waits == [0.5, 1.0, 2.0]


def test_a_missing_file_is_not_asked_for_again():
    blobs, _, waits = failing(0)
    with pytest.raises(FileNotFoundError):
        read(blobs, "none.bin", 0, 1)
    assert waits == []


def test_a_short_answer_is_a_failure():
    blobs, _, waits = failing(0, retries=1)
    with pytest.raises(OSError, match=r"the answer has 2 bytes of the 5 from byte 8"):
        read(blobs, "a.bin", 8, 5)
    assert waits == [0.5]

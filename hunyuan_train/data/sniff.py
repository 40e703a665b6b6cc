"""What a file is by its first bytes, and whether its container says that bytes are missing.

Decoders only report "invalid data", and FFmpeg opens a renamed JPEG as a one-frame video, so the
cause of a failure is read from the file itself: magic numbers, and the sizes that ISO media boxes,
Matroska segments and RIFF headers declare.
"""

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from hunyuan_train.data.quarantine import MediaError, Reason

_HEAD_BYTES = 4096


class Family(StrEnum):
    """Broad content classes."""

    image = "image"
    video = "video"
    """A container that may hold video."""
    audio = "audio"
    text = "text"
    other = "other"
    unknown = "unknown"


@dataclass(frozen=True, slots=True)
class Content:
    """The family of a file and its name in words, such as ``a JPEG image``."""

    family: Family
    name: str


_MAGIC: tuple[tuple[int, bytes, Content], ...] = (
    (0, b"\xff\xd8\xff", Content(Family.image, "a JPEG image")),
    (0, b"\x89PNG\r\n\x1a\n", Content(Family.image, "a PNG image")),
    (0, b"GIF8", Content(Family.image, "a GIF image")),
    (0, b"II*\x00", Content(Family.image, "a TIFF image")),
    (0, b"MM\x00*", Content(Family.image, "a TIFF image")),
    (8, b"WEBP", Content(Family.image, "a WebP image")),
    (8, b"AVI ", Content(Family.video, "an AVI file")),
    (8, b"WAVE", Content(Family.audio, "a WAV file")),
    (0, b"\x1aE\xdf\xa3", Content(Family.video, "a Matroska or WebM file")),
    (0, b"FLV", Content(Family.video, "an FLV file")),
    (0, b"OggS", Content(Family.video, "an Ogg file")),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", Content(Family.video, "an ASF or WMV file")),
    (0, b"\x00\x00\x01\xba", Content(Family.video, "an MPEG program stream")),
    (0, b"\x00\x00\x01\xb3", Content(Family.video, "an MPEG video stream")),
    (0, b"ID3", Content(Family.audio, "an MP3 file")),
    (0, b"fLaC", Content(Family.audio, "a FLAC file")),
    (0, b"PK\x03\x04", Content(Family.other, "a ZIP archive")),
    (0, b"\x1f\x8b", Content(Family.other, "a gzip archive")),
    (0, b"%PDF", Content(Family.other, "a PDF document")),
)
_ISO_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"styp"})
_IMAGE_BRANDS = frozenset({b"avif", b"avis", b"heic", b"heix", b"mif1"})


def sniff(path: Path) -> Content:
    """Name the content of ``path`` by its first bytes."""
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if head[4:8] in _ISO_BOXES:
        if head[4:8] == b"ftyp" and head[8:12] in _IMAGE_BRANDS:
            return Content(Family.image, "an AVIF or HEIC image")
        return Content(Family.video, "an MP4 or MOV file")
    for offset, magic, content in _MAGIC:
        if head[offset : offset + len(magic)] == magic and (offset == 0 or head[:4] == b"RIFF"):
            return content
    if len(head) > 188 and head[0] == 0x47 and head[188] == 0x47:
        return Content(Family.video, "an MPEG transport stream")
    return _sniff_text(head)


def check_complete(path: Path) -> None:
    """Raise :class:`MediaError` when the container declares more bytes than the file has.

    Covers ISO media (MP4, MOV), Matroska/WebM and RIFF (AVI, WebP); other formats pass.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        if head[4:8] in _ISO_BOXES:
            _check_iso(file, size)
        elif head[:4] == b"\x1aE\xdf\xa3":
            _check_matroska(file, size)
        elif head[:4] == b"RIFF":
            _check_declared(int.from_bytes(head[4:8], "little") + 8, size, "RIFF header")


def _sniff_text(head: bytes) -> Content:
    # A cut multi-byte character at the end of the window is not evidence against text.
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < _HEAD_BYTES:
            return Content(Family.unknown, "unknown data")
        text = head[: error.start].decode("utf-8")
    if any(ord(char) < 32 and char not in "\t\n\r\f" for char in text):
        return Content(Family.unknown, "unknown data")
    if text.lstrip().lower().startswith(("<!doctype html", "<html")):
        return Content(Family.text, "an HTML page")
    return Content(Family.text, "plain text")


def _check_iso(file: BinaryIO, size: int) -> None:
    offset, has_index, has_media = 0, False, False
    while offset + 8 <= size:
        file.seek(offset)
        header = file.read(16)
        length, kind = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:
            length = size - offset
        if length < 8:
            break
        has_index |= kind in (b"moov", b"moof")
        has_media |= kind == b"mdat"
        if offset + length > size and kind in (b"mdat", b"moov", b"moof"):
            missing = "" if has_index else ", so its index (moov box) is missing"
            raise MediaError(
                Reason.truncated,
                f"the {kind.decode()} box ends at byte {offset + length} but the file "
                f"has {size}{missing}",
            )
        offset += length
    if has_media and not has_index:
        raise MediaError(Reason.truncated, "the MP4 index (moov box) is missing")


def _check_matroska(file: BinaryIO, size: int) -> None:
    offset = 0
    for _ in range(2):  # the EBML header, then the segment
        file.seek(offset)
        head = file.read(12)
        id_bytes = _vint_length(head[:1])
        size_bytes = _vint_length(head[id_bytes : id_bytes + 1])
        raw = head[id_bytes : id_bytes + size_bytes]
        bits = 7 * size_bytes
        length = int.from_bytes(raw, "big") & ((1 << bits) - 1)
        if size_bytes == 0 or length == (1 << bits) - 1:  # all ones: unknown, as live muxers write
            return
        offset += id_bytes + size_bytes + length
    _check_declared(offset, size, "Matroska segment")


def _vint_length(first: bytes) -> int:
    return 9 - first[0].bit_length() if first and first[0] else 0


def _check_declared(declared: int, size: int, name: str) -> None:
    if declared > size:
        raise MediaError(
            Reason.truncated, f"the {name} declares {declared} bytes but the file has {size}"
        )

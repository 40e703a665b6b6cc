"""Listing sources: a folder, or a JSONL manifest, as files with captions."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hunyuan_train.data.quarantine import QuarantineRow, Reason

MANIFEST = "manifest.jsonl"
_VIDEO_TYPES = "mp4 mov m4v webm mkv avi gif mpg mpeg ts m2ts wmv flv ogv 3gp 3g2"
_IMAGE_TYPES = "jpg jpeg png webp bmp tif tiff avif ppm"
VIDEO_SUFFIXES = frozenset("." + name for name in _VIDEO_TYPES.split())
IMAGE_SUFFIXES = frozenset("." + name for name in _IMAGE_TYPES.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One clip or image file and its caption."""

    file: str
    """Path relative to the source folder, with forward slashes; the identity of the source."""
    path: Path
    media: str
    """``video`` or ``image``, by the file's suffix."""
    caption: str
    """Stripped; empty when there is none."""
    caption_problem: str = ""
    """Why the caption is empty."""


@dataclass(frozen=True, slots=True)
class SourceList:
    """The sources, sorted by file, and the entries that name none."""

    sources: list[Source]
    rejected: list[QuarantineRow]


def list_sources(source: str) -> SourceList:
    """List the clips and images of ``source`` with their captions.

    Args:
        source: A manifest file; or a folder with ``manifest.jsonl``, whose rows have ``file``
            (relative to the manifest) and ``caption``, further fields ignored; or a folder
            (recursive) where ``name.txt`` beside ``name.mp4`` holds the caption.

    Raises:
        ValueError: The source does not exist, or holds no clip or image at all.
    """
    if not source:
        raise ValueError("data.source is empty; set it to a folder of clips or a manifest.jsonl")
    root = Path(source)
    if not root.exists():
        raise ValueError(f"data.source={source} does not exist; set it to a folder or a manifest")
    manifest = root / MANIFEST if root.is_dir() else root
    if manifest.is_file():
        listing = _from_manifest(manifest)
    else:
        listing = SourceList(_from_folder(root), [])
    if not listing.sources and not listing.rejected:
        raise ValueError(
            f"data.source={source} holds no clips or images; put {MANIFEST} there, or files such "
            "as name.mp4 with name.txt beside them"
        )
    return listing


def _from_folder(root: Path) -> list[Source]:
    sources: list[Source] = []
    for path in sorted(_walk_files(root)):
        media = _media(path.suffix)
        if media:
            caption, problem = _read_caption(path.with_suffix(".txt"))
            sources.append(
                Source(
                    file=path.relative_to(root).as_posix(),
                    path=path,
                    media=media,
                    caption=caption,
                    caption_problem=problem,
                )
            )
    return sources


def _walk_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.is_file():
            yield path


def _read_caption(path: Path) -> tuple[str, str]:
    if not path.is_file():
        return "", f"no caption: {path.name} is missing"
    try:
        caption = path.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        return "", f"no caption: {path.name} is not UTF-8 text"
    return caption, "" if caption else f"no caption: {path.name} is empty"


def _from_manifest(manifest: Path) -> SourceList:
    sources: dict[str, Source] = {}
    rejected: list[QuarantineRow] = []
    with manifest.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, source, problem in _parse_rows(manifest, lines):
            if source is not None and source.file in sources:
                problem = f"{source.file} is listed twice; this line is ignored"
            if problem or source is None:
                rejected.append(
                    QuarantineRow(
                        file=f"{manifest.name}:{number}", reason=Reason.manifest, detail=problem
                    )
                )
            else:
                sources[source.file] = source
    return SourceList([sources[file] for file in sorted(sources)], rejected)


def _parse_rows(manifest: Path, lines: Iterable[str]) -> Iterator[tuple[int, Source | None, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, None, f"the line is not JSON: {error.msg} at column {error.colno}"
            continue
        file = row.get("file") if isinstance(row, dict) else None
        if not isinstance(file, str) or not file:
            yield number, None, "the line has no field 'file' with a path"
            continue
        path = manifest.parent / file
        media = _media(path.suffix)
        if not media:
            yield number, None, f"{file}: suffix {path.suffix!r} is neither a video nor an image"
            continue
        caption = row.get("caption")
        text = caption.strip() if isinstance(caption, str) else ""
        yield (
            number,
            Source(
                file=Path(file).as_posix(),
                path=path,
                media=media,
                caption=text,
                caption_problem="" if text else f"no caption: {manifest.name}:{number} has none",
            ),
            "",
        )


def _media(suffix: str) -> str:
    if suffix.lower() in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix.lower() in IMAGE_SUFFIXES else ""

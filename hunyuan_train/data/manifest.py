"""Listing sources: a folder, or a JSONL manifest, as files with captions."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hunyuan_train.data.captions import render_captions
from hunyuan_train.data.quarantine import QuarantineRow, Reason

MANIFEST = "manifest.jsonl"
_VIDEO_TYPES = "mp4 mov m4v webm mkv avi gif mpg mpeg ts m2ts wmv flv ogv 3gp 3g2"
_IMAGE_TYPES = "jpg jpeg png webp bmp tif tiff avif ppm"
VIDEO_SUFFIXES = frozenset("." + name for name in _VIDEO_TYPES.split())
IMAGE_SUFFIXES = frozenset("." + name for name in _IMAGE_TYPES.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One clip or image file, its captions, and what its manifest row says about drawing it."""

    file: str
    """Path relative to the source folder, with forward slashes; the identity of the source."""
    path: Path
    media: str
    """``video`` or ``image``, by the file's suffix."""
    captions: tuple[str, ...]
    """All renderings of the caption, stripped; empty when there is none."""
    caption_problem: str = ""
    """Why there is no caption."""
    concept: str = ""
    """What ``data.concept_shares`` calls it."""
    repeat: int = 1
    """Times it is drawn in an epoch."""

    @property
    def caption(self) -> str:
        """The first rendering, which keeps all fields; empty when there is none."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True, slots=True)
class SourceList:
    """The sources, sorted by file, and the entries that name none."""

    sources: list[Source]
    rejected: list[QuarantineRow]


def list_sources(source: str, caption_variants: int = 1, field_drop: float = 0.0) -> SourceList:
    """List the clips and images of ``source`` with their captions.

    Args:
        source: A manifest file; or a folder with ``manifest.jsonl``, whose rows have ``file``
            (relative to the manifest) and ``caption`` (a text, or an object of texts), and may have
            ``concept`` and ``repeat``, further fields ignored; or a folder (recursive) where
            ``name.txt`` or ``name.mp4.txt`` beside ``name.mp4`` holds the caption.
        caption_variants: Renderings of a caption that is an object.
        field_drop: Probability with which a rendering after the first leaves out a field.

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
        listing = _from_manifest(manifest, caption_variants, field_drop)
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
            captions, problem = _read_caption(path)
            sources.append(
                Source(
                    file=path.relative_to(root).as_posix(),
                    path=path,
                    media=media,
                    captions=captions,
                    caption_problem=problem,
                )
            )
    return sources


def _walk_files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if not hidden and path.is_file():
            yield path


def _read_caption(media: Path) -> tuple[tuple[str, ...], str]:
    path, longer = media.with_suffix(".txt"), media.with_name(f"{media.name}.txt")
    if longer.is_file():
        if path.is_file():
            return (), f"two captions: {path.name} and {longer.name}; keep one of them"
        path = longer
    if not path.is_file():
        return (), f"no caption: {path.name} is missing"
    try:
        captions = render_captions(path.read_text(encoding="utf-8-sig"), media.name, 1, 0.0)
    except UnicodeDecodeError:
        return (), f"no caption: {path.name} is not UTF-8 text"
    return captions, "" if captions else f"no caption: {path.name} is empty"


def _from_manifest(manifest: Path, variants: int, field_drop: float) -> SourceList:
    sources: dict[str, Source] = {}
    rejected: list[QuarantineRow] = []
    with manifest.open(encoding="utf-8-sig", errors="replace") as lines:
        for number, row, problem in _parse_rows(lines):
            place = f"{manifest.name}:{number}"
            file = Path(row["file"]).as_posix() if not problem else ""
            if file in sources:
                problem = f"{file} is listed twice; this line is ignored"
            if problem:
                rejected.append(QuarantineRow(file=place, reason=Reason.manifest, detail=problem))
                continue
            caption = row.get("caption") or ""
            if isinstance(caption, dict):
                caption = {name: text for name, text in caption.items() if text is not None}
            captions = render_captions(caption, file, variants, field_drop)
            sources[file] = Source(
                file=file,
                path=manifest.parent / file,
                media=_media(Path(file).suffix),
                captions=captions,
                caption_problem="" if captions else f"no caption: {place} has none",
                concept=(row.get("concept") or "").strip(),
                repeat=row.get("repeat", 1),
            )
    return SourceList([sources[file] for file in sorted(sources)], rejected)


def _parse_rows(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, Any], str]]:
    """Yield (line number, row, what is wrong with it) of the lines that are not blank."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            yield number, {}, f"the line is not JSON: {error.msg} at column {error.colno}"
            continue
        yield number, row, _row_problem(row)


def _row_problem(row: object) -> str:
    """Say in one sentence what is wrong with a manifest row; empty when nothing is."""
    file = row.get("file") if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(file, str) or not file:
        return "the line has no field 'file' with a path"
    suffix = Path(file).suffix
    if not _media(suffix):
        return f"{file}: suffix {suffix!r} is neither a video nor an image"
    problem = _caption_problem(row.get("caption"))
    if not problem and not isinstance(row.get("concept", ""), str | None):
        problem = f"field 'concept' is {_shown(row['concept'])}; write a text"
    repeat = row.get("repeat", 1)
    if not problem and (type(repeat) is not int or repeat < 1):
        problem = f"field 'repeat' is {_shown(repeat)}; write a whole number of at least 1"
    return problem and f"{file}: {problem}"


def _caption_problem(caption: object) -> str:
    if not isinstance(caption, dict):
        valid = caption is None or isinstance(caption, str)
        fix = "write a text, or an object of texts"
        return "" if valid else f"field 'caption' is {_shown(caption)}; {fix}"
    for name, text in caption.items():
        if text is not None and not isinstance(text, str):
            return f"field '{name}' of its caption is {_shown(text)}; write a text"
    return ""


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _media(suffix: str) -> str:
    if suffix.lower() in VIDEO_SUFFIXES:
        return "video"
    return "image" if suffix.lower() in IMAGE_SUFFIXES else ""

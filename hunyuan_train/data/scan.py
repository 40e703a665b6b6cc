"""An index of source files, made by looking into every file once, for training straight from them.

It lies in ``online/`` of ``data.latents``::

    index-<digest>/       one row per sample; its shard is the source file, without a byte range
    probes-<hash>.jsonl   what each file was found to be, by size and time; read on the next start
    quarantine.jsonl      the files left out, with reasons
"""

import fcntl
import json
import logging
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.decode_job import probe_file
from hunyuan_train.data.index import Blob, SampleRow, TextRef
from hunyuan_train.data.index_writer import write_index
from hunyuan_train.data.manifest import Source, SourceList, list_sources
from hunyuan_train.data.parts import key_of, write_lines
from hunyuan_train.data.quarantine import QuarantineRow, Reason, SampleError
from hunyuan_train.data.workers import ProcessWorkers

logger = logging.getLogger(__name__)

FOLDER = "online"
QUARANTINE = "quarantine.jsonl"
_AHEAD = 8
"""Files per process that wait to be looked into."""
_REPORT_S = 10.0
_STALE_S = 3600.0


def index_sources(cfg: DataConfig, text_length: int, *, captions: bool = True) -> Path:
    """Index the samples of ``cfg.source`` and return the folder of the index.

    Files whose size and time are those of an earlier call are not opened. Several processes may
    call this at once: one looks into the files, the others wait for it.

    Args:
        cfg: Source and buckets.
        text_length: Most tokens of a caption.
        captions: Whether a file without a caption is left out.

    Raises:
        ValueError: A setting is missing, or no file is usable.
        OSError: ``cfg.latents`` cannot be written.
    """
    if not cfg.latents:
        raise ValueError("data.latents is empty; set it to a folder for the index of data.source")
    listing = list_sources(cfg.source, cfg.caption_variants, cfg.field_drop)
    folder = Path(cfg.latents) / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[SampleRow] = []
    quarantine = list(listing.rejected)
    with _locked(folder / "scan.lock"):
        if not captions:
            listing = without_captions(listing)
            quarantine = list(listing.rejected)
        probes = _probe_all(listing.sources, folder / f"probes-{probe_key(cfg)}.jsonl", cfg)
        for source in listing.sources:
            probe = probes[source.file]
            if "reason" in probe:
                reason = Reason(probe["reason"])
                row = QuarantineRow(file=source.file, reason=reason, detail=probe["detail"])
                quarantine.append(row)
            else:
                rows.extend(_row(source, shape, text_length) for shape in probe["samples"])
        quarantine.sort(key=lambda row: row.file)
        write_lines(folder / QUARANTINE, [asdict(row) for row in quarantine])
        if not rows:
            counts = Counter(str(row.reason) for row in quarantine).most_common()
            reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
            raise ValueError(
                f"data.source={cfg.source} has no usable file ({reasons}); {folder / QUARANTINE} "
                "says what is wrong with each"
            )
        index = folder / write_index(folder, rows)
        for old in folder.glob("index-*"):
            # A process that was started just before may not have opened its index yet.
            if old != index and time.time() - old.stat().st_mtime > _STALE_S:
                shutil.rmtree(old, ignore_errors=True)
        return index


def without_captions(listing: SourceList) -> SourceList:
    """Return the same files with an empty caption each, so that none is left out for its lack."""
    bare = [replace(source, captions=("",), caption_problem="") for source in listing.sources]
    return replace(listing, sources=bare)


def probe_key(cfg: DataConfig) -> str:
    """Hash what the samples of a file depend on besides the file itself."""
    names = ("anchors", "durations", "max_aspect", "bucket_stride", "max_upscale", "max_fps")
    settings = {name: getattr(cfg, name) for name in (*names, "max_crop_loss")}
    return key_of({**settings, "assign": str(cfg.assign)})


def _row(source: Source, shape: dict[str, Any], text_length: int) -> SampleRow:
    bucket = Bucket.parse(shape["bucket"])
    return SampleRow(
        sample_id=f"{source.file}@{shape['anchor']}:{bucket}",
        source=source.file,
        bucket=bucket,
        anchor=shape["anchor"],
        concept=source.concept,
        repeat=source.repeat,
        fps=shape["fps"],
        scale=shape["scale"],
        crop_loss=shape["crop_loss"],
        latents=Blob(source.file, 0, 0, 0),
        texts=tuple(
            TextRef(
                caption=caption,
                blob=Blob(source.file, 0, 0, 0),
                # For the predicted cost alone: English has about 4 tokens to 3 words.
                tokens=min(text_length, 2 + len(caption.split()) * 4 // 3),
            )
            for caption in source.captions
        ),
    )


def _probe_all(sources: list[Source], path: Path, cfg: DataConfig) -> dict[str, dict[str, Any]]:
    """Return ``{"samples": [...]}`` or ``{"reason": ..., "detail": ...}`` by file."""
    known = _read_probes(path)
    probes: dict[str, dict[str, Any]] = {}
    pending: list[tuple[Source, dict[str, Any]]] = []
    for source in sources:
        if not source.captions:
            probes[source.file] = _refused(Reason.no_caption, source.caption_problem)
            continue
        try:
            stat = source.path.stat()
        except FileNotFoundError:
            probes[source.file] = _refused(Reason.missing, "the file does not exist")
            continue
        except OSError as error:
            detail = f"it cannot be read: {error.strerror}"
            probes[source.file] = _refused(Reason.unreadable, detail)
            continue
        stamp = {"file": source.file, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        found = known.get(source.file, {})
        if all(found.get(name) == value for name, value in stamp.items()):
            probes[source.file] = found
        else:
            pending.append((source, stamp))
    if not pending:
        return probes
    write_lines(path, list(known.values()))  # whole lines, whatever a killed process left
    with path.open("a", encoding="utf-8") as file:
        for stamp, probe in _probed(pending, cfg):
            probes[stamp["file"]] = probe
            # What may be the machine's fault, like a timeout, is looked at again next time.
            if probe.get("reason") != Reason.unreadable:
                file.write(json.dumps({**stamp, **probe}, ensure_ascii=False) + "\n")
    write_lines(path, [probe for probe in _read_probes(path).values() if probe["file"] in probes])
    return probes


def _probed(
    pending: list[tuple[Source, dict[str, Any]]], cfg: DataConfig
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Look into files by several processes, a few ahead; yield (stamp, probe) in their order."""
    started = reported = time.monotonic()
    workers = ProcessWorkers(probe_file, cfg.workers, cfg.worker_timeout_s)
    waiting = iter(pending)
    running: deque[tuple[dict[str, Any], Future[Any]]] = deque()
    try:
        for done in range(len(pending)):
            while len(running) < _AHEAD * cfg.workers and (item := next(waiting, None)):
                source, stamp = item
                future = workers.submit(source.file, str(source.path), source.media, cfg)
                running.append((stamp, future))
            stamp, future = running.popleft()
            try:
                shapes = [{**asdict(s), "bucket": str(s.bucket)} for s in future.result()]
                yield stamp, {"samples": shapes}
            except SampleError as error:
                yield stamp, _refused(error.reason, error.detail)
            if time.monotonic() - reported > _REPORT_S:
                reported = time.monotonic()
                seconds = reported - started
                logger.info("looked into %d of %d files, %.0f s", done + 1, len(pending), seconds)
    finally:
        workers.close()


def _read_probes(path: Path) -> dict[str, dict[str, Any]]:
    probes: dict[str, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # the end of what a killed process wrote
                probe = json.loads(line)
                probes[probe["file"]] = probe
    return probes


def _refused(reason: Reason, detail: str) -> dict[str, Any]:
    return {"reason": str(reason), "detail": detail}


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that the kernel releases when the process ends in any way."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield

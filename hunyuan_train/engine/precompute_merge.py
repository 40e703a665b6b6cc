"""The end of precompute: index, quarantine list and meta data over all committed parts."""

import hashlib
import json
import math
import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.index import FORMAT, Blob, SampleRow, TextRef
from hunyuan_train.data.index_writer import write_index
from hunyuan_train.data.manifest import Source, SourceList
from hunyuan_train.data.parts import PartStore, write_lines, write_text
from hunyuan_train.data.quarantine import MediaError, QuarantineRow, Reason
from hunyuan_train.data.stills import num_stills
from hunyuan_train.data.store import META, StoreMeta
from hunyuan_train.engine.precompute_work import MEDIA, Worker

QUARANTINE = "quarantine.jsonl"
MERGED = "merged.json"
"""What the index was last made of, so that it is made once however many processes ask for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What an index holds."""

    samples: int
    ok: int
    """Sources with at least one sample."""
    quarantined: dict[str, int]
    """Entries of the quarantine list, by reason."""
    index: str
    """Name of the index."""


class _Changed(MediaError):
    """A source that is another one now than when its unit was done."""

    def __init__(self) -> None:
        super().__init__(Reason.unreadable, "it changed or vanished during the run; run again")


def merge(worker: Worker, listing: SourceList, known: frozenset[str]) -> Merged:
    """Write the index of ``listing``, unless it is there, and drop the parts that nothing needs.

    Call it with the store's ``index`` claimed, when all units are done.

    Args:
        worker: The store and what names its entries.
        listing: The sources.
        known: Parts that were there when this process began; others are not dropped.
    """
    worker.store.refresh()
    state = _state(worker, listing)
    merged = _merged_before(worker, state)
    if merged is None:
        merged, complete = _merge(worker, listing, known)
        worker.store.refresh()
        record = {"state": state, "parts": sorted(worker.store.parts), **asdict(merged)}
        write_text(worker.store.folder / MERGED, json.dumps(record if complete else {}) + "\n")
    return merged


def _state(worker: Worker, listing: SourceList) -> str:
    """Hash all that the index depends on besides the parts."""
    digest = hashlib.sha256(f"{FORMAT} {worker.text_key('', '')} {worker.config_hash}".encode())
    for source in listing.sources:
        try:
            key = worker.source_key(source, None)
        except OSError as error:
            key = f"{type(error).__name__} {error.strerror}"
        digest.update(repr((key, *(getattr(source, name) for name in _LISTED))).encode())
    for row in listing.rejected:
        digest.update(repr((row.file, str(row.reason), row.detail)).encode())
    return digest.hexdigest()


_LISTED = ("file", "captions", "caption_problem", "concept", "repeat")


def is_merged(store: PartStore) -> bool:
    """Return whether the index was made of just the parts that there are."""
    try:
        record = json.loads((store.folder / MERGED).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return record.get("parts") == sorted(store.parts)


def _merged_before(worker: Worker, state: str) -> Merged | None:
    """Return what the index in the store holds if it is the one that a merge would write."""
    folder = worker.store.folder
    try:
        record = json.loads((folder / MERGED).read_text(encoding="utf-8"))
        meta = json.loads((folder / META).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    same = record.get("state") == state and is_merged(worker.store)
    if not same or meta.get("index") != record["index"] or not (folder / record["index"]).is_dir():
        return None
    return Merged(**{name: record[name] for name in Merged.__dataclass_fields__})


def _merge(worker: Worker, listing: SourceList, known: frozenset[str]) -> tuple[Merged, bool]:
    """Return what was written, and whether every source was found as its unit left it."""
    store = worker.store
    rows: list[SampleRow] = []
    complete = True
    quarantine = list(listing.rejected)
    used: set[str] = set()
    for source in listing.sources:
        try:
            rows.extend(_rows_of(worker, source, used))
        except MediaError as error:
            complete = complete and not isinstance(error, _Changed)
            quarantine.append(
                QuarantineRow(file=source.file, reason=error.reason, detail=error.detail)
            )
    quarantine.sort(key=lambda row: row.file)
    index = write_index(store.folder, rows)
    meta = StoreMeta(
        format=FORMAT,
        index=index,
        storage_dtype=str(worker.cfg.storage_dtype),
        latent_channels=_latent_channels(worker, rows),
        text_length=worker.text.text_length,
        text_dim=worker.text.text_dim,
        pooled_dim=worker.text.pooled_dim,
        vae_fingerprint=worker.vae.fingerprint,
        scaling_factor=worker.vae.scaling_factor,
        text_fingerprint=worker.text.fingerprint,
        config_hash=worker.config_hash,
        empty_texts={media: _empty_text(worker, media, used) for media in MEDIA},
        condition_frames=worker.cfg.condition_frames,
        text_images=worker.text.sees_images,
    )
    # A reader follows meta.json to the index, so replacing it switches over in one step.
    write_lines(store.folder / QUARANTINE, [asdict(row) for row in quarantine])
    write_text(store.folder / META, json.dumps(asdict(meta), indent=2) + "\n")
    for old in (*store.folder.glob("index-*"), *store.folder.glob(".index-*.tmp")):
        if old.name != index:
            old.unlink() if old.is_file() else shutil.rmtree(old, ignore_errors=True)
    store.prune(used, known)
    merged = Merged(
        samples=len(rows),
        ok=len({row.source for row in rows}),
        quarantined=dict(sorted(Counter(str(row.reason) for row in quarantine).items())),
        index=index,
    )
    return merged, complete


def _rows_of(worker: Worker, source: Source, used: set[str]) -> list[SampleRow]:
    """Return the samples of a source and mark the parts it needs, or raise why it has none."""
    try:
        key = worker.source_key(source, None)
    except FileNotFoundError as error:
        raise MediaError(Reason.missing, "the file does not exist") from error
    except OSError as error:
        raise MediaError(Reason.unreadable, f"it cannot be read: {error.strerror}") from error
    if source.file in worker.store.digests:
        used.add(worker.store.digests[source.file][0])
    part, entry = worker.store.sources.get(key, ("", {}))
    used.add(part)
    if "reason" in entry:
        raise MediaError(Reason(entry["reason"]), entry["detail"])
    if not source.caption:
        raise MediaError(Reason.no_caption, source.caption_problem)
    if not entry:
        raise _Changed
    return [_row(worker, source, key, part, stored, used) for stored in entry["rows"]]


def _row(
    worker: Worker, source: Source, key: str, part: str, stored: dict[str, Any], used: set[str]
) -> SampleRow:
    bucket = Bucket.parse(stored["bucket"])
    picture = worker.picture(key, bucket)
    texts = [_text(worker, caption, bucket.media, used, picture) for caption in source.captions]
    if not texts[0].tokens:
        raise MediaError(Reason.no_caption, "no caption: the text encoder sees no token in it")
    return SampleRow(
        sample_id=f"{source.file}@{stored['anchor']}:{bucket}",
        source=source.file,
        bucket=bucket,
        anchor=stored["anchor"],
        concept=source.concept,
        repeat=source.repeat,
        fps=stored["fps"],
        scale=stored["scale"],
        crop_loss=stored["crop_loss"],
        latents=Blob(part, **stored["latents"]),
        texts=tuple(text for text in texts if text.tokens),
    )


def _text(worker: Worker, caption: str, media: str, used: set[str], picture: str = "") -> TextRef:
    key = worker.text_key(caption, media, picture)
    if key not in worker.store.texts:
        raise _Changed
    part, entry = worker.store.texts[key]
    used.add(part)
    blob = Blob(part, entry["offset"], entry["nbytes"], entry["digest"])
    return TextRef(caption=caption, blob=blob, tokens=entry["tokens"])


def _empty_text(worker: Worker, media: str, used: set[str]) -> dict[str, Any]:
    if worker.text_key("", media) not in worker.store.texts:
        # No unit ran: every source was rejected by its manifest line.
        return {**asdict(Blob("", 0, 0, 0)), "tokens": 0}
    text = _text(worker, "", media, used)
    return {**asdict(text.blob), "tokens": text.tokens}


def _latent_channels(worker: Worker, rows: list[SampleRow]) -> int:
    for row in rows:
        frames, *area = row.bucket.latent_shape
        frames += num_stills(worker.cfg.condition_frames, row.bucket.frames)
        return row.latents.nbytes // (2 * frames * math.prod(area) * worker.dtype.itemsize)
    return 0

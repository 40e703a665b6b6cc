"""The end of precompute: index, quarantine list and meta data over all committed parts."""

import json
from dataclasses import asdict
from typing import Any

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.index import FORMAT, META, SampleRow, StoreMeta
from hunyuan_train.data.manifest import Source, SourceList
from hunyuan_train.data.parts import key_of, write_lines, write_text
from hunyuan_train.data.quarantine import MediaError, QuarantineRow, Reason
from hunyuan_train.engine.precompute_work import MEDIA, Worker

QUARANTINE = "quarantine.jsonl"


def merge(worker: Worker, listing: SourceList) -> tuple[list[SampleRow], list[QuarantineRow]]:
    """Write the index of ``listing`` and drop the parts that nothing refers to any more.

    Call it with the store's ``index`` lock held, when all units are done.

    Returns:
        The rows of the index and of the quarantine list, as written.
    """
    store = worker.store
    store.refresh()
    rows: list[SampleRow] = []
    quarantine = list(listing.rejected)
    used: set[str] = set()
    for source in listing.sources:
        try:
            rows.extend(_rows_of(worker, source, used))
        except MediaError as error:
            quarantine.append(
                QuarantineRow(file=source.file, reason=error.reason, detail=error.detail)
            )
    quarantine.sort(key=lambda row: row.file)
    lines = [row.to_json() for row in rows]
    index = f"index-{key_of(json.dumps(lines))}.jsonl"
    meta = StoreMeta(
        format=FORMAT,
        index=index,
        latent_channels=_latent_channels(worker, rows),
        text_length=worker.text.text_length,
        text_dim=worker.text.text_dim,
        pooled_dim=worker.text.pooled_dim,
        vae_fingerprint=worker.vae.fingerprint,
        scaling_factor=worker.vae.scaling_factor,
        text_fingerprint=worker.text.fingerprint,
        config_hash=worker.config_hash,
        empty_texts={media: _empty_text(worker, media, used) for media in MEDIA},
    )
    # A reader follows meta.json to the index, so replacing it switches over in one step.
    write_lines(store.folder / index, lines)
    write_lines(store.folder / QUARANTINE, [asdict(row) for row in quarantine])
    write_text(store.folder / META, json.dumps(asdict(meta), indent=2) + "\n")
    for old in store.folder.glob("index-*.jsonl"):
        if old.name != index:
            old.unlink(missing_ok=True)
    store.prune(used)
    return rows, quarantine


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
        raise _changed()
    return [
        _row(worker, source, f"{key}/{number}", part, stored, used)
        for number, stored in enumerate(entry["rows"])
    ]


def _changed() -> MediaError:
    return MediaError(Reason.unreadable, "it changed or vanished during the run; run again")


def _row(
    worker: Worker,
    source: Source,
    latent_key: str,
    part: str,
    stored: dict[str, Any],
    used: set[str],
) -> SampleRow:
    bucket = Bucket.parse(stored["bucket"])
    text_key = worker.text_key(source.caption, bucket.media)
    if text_key not in worker.store.texts:
        raise _changed()
    text_part, tokens = worker.store.texts[text_key]
    if not tokens:
        raise MediaError(Reason.no_caption, "no caption: the text encoder sees no token in it")
    used.add(text_part)
    return SampleRow(
        sample_id=f"{source.file}@{stored['anchor']}:{bucket}",
        source=source.file,
        bucket=bucket,
        anchor=stored["anchor"],
        caption=source.caption,
        media=bucket.media,
        shard=part,
        latent_key=latent_key,
        text_shard=text_part,
        text_key=text_key,
        text_tokens=tokens,
        fps=stored["fps"],
        scale=stored["scale"],
        crop_loss=stored["crop_loss"],
    )


def _empty_text(worker: Worker, media: str, used: set[str]) -> dict[str, Any]:
    key = worker.text_key("", media)
    if key not in worker.store.texts:  # no unit ran: every source was rejected by its manifest line
        return {"shard": "", "key": key, "tokens": 0}
    part, tokens = worker.store.texts[key]
    used.add(part)
    return {"shard": part, "key": key, "tokens": tokens}


def _latent_channels(worker: Worker, rows: list[SampleRow]) -> int:
    for row in rows:
        return worker.store.sources[row.latent_key.split("/")[0]][1]["channels"]
    return 0

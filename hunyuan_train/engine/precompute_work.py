"""One unit of precompute: decode, encode in batches per bucket, encode captions, commit."""

import hashlib
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.dataset import PixelSample, check_readable, decode_samples
from hunyuan_train.data.manifest import Source
from hunyuan_train.data.parts import Part, PartStore, key_of
from hunyuan_train.data.quarantine import MediaError, Reason
from hunyuan_train.data.stills import encode_stills, num_stills
from hunyuan_train.encoders.latents import LatentEncoder
from hunyuan_train.encoders.text import TextEncoder

PIPELINE = 2
"""Raise it when decoding, resizing, cropping or what parts record changes: stores are redone."""
MEDIA = ("image", "video")
_TEXT_BATCH = 32
_RACY_NS = 2_000_000_000
"""A file changed this shortly before it was hashed may change again within one clock tick."""


class Worker:
    """One process's encoders, its view of the store, and what it has done.

    Args:
        cfg: What to read and how to bucket it.
        vae: Pixels to latents.
        text: Captions to features.
    """

    def __init__(self, cfg: DataConfig, vae: LatentEncoder, text: TextEncoder) -> None:
        self.cfg = cfg
        self.vae = vae
        self.text = text
        self.store = PartStore(Path(cfg.latents))
        self.config_hash = config_hash(cfg, vae.fingerprint)
        self.encoded = 0
        self.texts = 0
        self.rejected = 0
        self.dtype: torch.dtype = getattr(torch, str(cfg.storage_dtype))
        self._table = cfg.bucket_table()

    def do_unit(self, sources: list[Source]) -> None:
        """Encode what the store lacks of ``sources`` and commit it as one part."""
        self.store.refresh()
        part = Part()
        keyed: list[tuple[Source, str]] = []
        for source in sources:
            try:
                keyed.append((source, self.source_key(source, part)))
            except OSError:
                continue  # missing or unreadable: the merge reports it
        self._encode_sources(
            {key: source for source, key in keyed if key not in self.store.sources}, part
        )
        self._encode_texts(keyed, part)
        if part.sources or part.texts or part.digests:
            self.store.commit(part)

    def source_key(self, source: Source, part: Part | None) -> str:
        """Name the latents of a file: a hash of its bytes, its suffix and all that shapes them.

        A file whose size and time are those of its last reading is not read again.

        Args:
            source: The file.
            part: Where a newly computed digest is recorded.

        Raises:
            OSError: The file cannot be read.
        """
        stat = source.path.stat()
        _, known = self.store.digests.get(source.file, ("", {}))
        same = (known.get("size"), known.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
        if same and stat.st_mtime_ns + _RACY_NS < known["hashed_ns"]:
            digest = known["sha256"]
        else:
            now = time.time_ns()
            with source.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if part is not None:
                part.digests[source.file] = {
                    "size": stat.st_size,
                    "mtime_ns": stat.st_mtime_ns,
                    "hashed_ns": now,
                    "sha256": digest,
                }
        return source_key(digest, source.path.suffix, self.config_hash)

    def text_key(self, caption: str, media: str) -> str:
        """Name the features of a caption."""
        return text_key(self.text.fingerprint, str(self.cfg.storage_dtype), caption, media)

    def _encode_sources(self, pending: dict[str, Source], part: Part) -> None:
        batches = _LatentBatches(self.vae, self.cfg, self.dtype, part)
        for key, result in self._decoded(pending):
            if isinstance(result, MediaError):
                part.sources[key] = {"reason": str(result.reason), "detail": result.detail}
            else:
                batches.add(key, result)
        batches.flush()
        bad = sum("reason" in entry for entry in part.sources.values())
        self.rejected += bad
        self.encoded += len(part.sources) - bad

    def _decoded(
        self, pending: dict[str, Source]
    ) -> Iterator[tuple[str, list[PixelSample] | MediaError]]:
        """Decode on threads, a few files ahead; skip what says nothing about the file's bytes."""
        running: deque[tuple[str, Future[list[PixelSample] | MediaError | None]]] = deque()
        waiting = deque(pending.items())
        with ThreadPoolExecutor(self.cfg.decode_workers, "decode") as pool:
            while waiting or running:
                while waiting and len(running) <= self.cfg.decode_workers:
                    key, source = waiting.popleft()
                    running.append((key, pool.submit(self._decode, source)))
                key, future = running.popleft()
                result = future.result()
                if result is not None:
                    yield key, result

    def _decode(self, source: Source) -> list[PixelSample] | MediaError | None:
        try:
            if source.caption:
                return decode_samples(source.path, source.media, self.cfg, self._table)
            # A broken file without a caption is reported for being broken.
            check_readable(source.path, source.media)
            return None
        except MediaError as error:
            return error
        except OSError:
            return None  # vanished meanwhile: the merge reports it
        except Exception as error:
            error.add_note(f"while decoding {source.path}")
            raise

    def _encode_texts(self, keyed: list[tuple[Source, str]], part: Part) -> None:
        wanted: dict[str, set[str]] = {media: {""} for media in MEDIA}
        for source, key in keyed:
            entry = part.sources.get(key) or self.store.sources.get(key, ("", {}))[1]
            for row in entry.get("rows", []):
                wanted[Bucket.parse(row["bucket"]).media].update(source.captions)
        for media, captions in wanted.items():
            missing = sorted(
                caption
                for caption in captions
                if self.text_key(caption, media) not in self.store.texts
            )
            for start in range(0, len(missing), _TEXT_BATCH):
                self._encode_text_batch(missing[start : start + _TEXT_BATCH], media, part)

    def _encode_text_batch(self, captions: list[str], media: str, part: Part) -> None:
        features = self.text.encode(captions, media)
        for row, caption in enumerate(captions):
            tokens = int(features.mask[row].sum())
            if not bool(features.mask[row, :tokens].all()):
                raise ValueError(
                    f"the text encoder {self.text.fingerprint} pads caption {caption!r} on the "
                    "left; only right-padded features can be stored"
                )
            states = features.states[row, :tokens].to("cpu", self.dtype)
            pooled = features.pooled[row].to("cpu", self.dtype)
            if not bool(states.isfinite().all() and pooled.isfinite().all()):
                raise ValueError(
                    f"the text features of {caption!r} are not finite in {self.dtype}; set "
                    "data.storage_dtype=float32, or check the text encoder's weights"
                )
            key = self.text_key(caption, media)
            part.texts[key] = {"tokens": tokens}
            part.tensors[f"{key}/pooled"] = pooled.clone()
            part.tensors[f"{key}/states"] = states.clone()
            self.texts += bool(caption)


class _LatentBatches:
    """Collects pixels per bucket and encodes a bucket's clips together.

    Waiting pixels are bounded too: when all buckets together hold several batches, all are encoded.
    """

    _WAITING_BATCHES = 4

    def __init__(self, vae: LatentEncoder, cfg: DataConfig, dtype: torch.dtype, part: Part) -> None:
        self._vae = vae
        self._dtype = dtype
        self._max_pixels = cfg.encode_pixels
        self._stills = cfg.condition_frames
        self._part = part
        self._waiting: dict[Bucket, list[tuple[str, int, np.ndarray]]] = {}
        self._pixels = 0

    def add(self, key: str, samples: list[PixelSample]) -> None:
        """Take the samples of one source, encoding what fills a batch."""
        self._part.sources[key] = {
            "rows": [
                {
                    "bucket": str(sample.bucket),
                    "anchor": sample.anchor,
                    "fps": sample.fps,
                    "scale": sample.scale,
                    "crop_loss": sample.crop_loss,
                }
                for sample in samples
            ]
        }
        for number, sample in enumerate(samples):
            waiting = self._waiting.setdefault(sample.bucket, [])
            waiting.append((key, number, sample.pixels))
            self._pixels += _num_pixels(sample.bucket)
            if (len(waiting) + 1) * _num_pixels(sample.bucket) > self._max_pixels:
                self._encode(sample.bucket)
        if self._pixels > self._WAITING_BATCHES * self._max_pixels:
            self.flush()

    def flush(self) -> None:
        """Encode everything that waits."""
        for bucket in sorted(self._waiting):
            self._encode(bucket)

    def _encode(self, bucket: Bucket) -> None:
        waiting = self._waiting.pop(bucket)
        self._pixels -= len(waiting) * _num_pixels(bucket)
        clips = [pixels for _, _, pixels in waiting]
        mean, std = self._vae.encode(clips)
        moments = {"mean": mean, "std": std}
        if num_stills(self._stills, bucket.frames):
            moments["stills"] = encode_stills(self._vae.encode, clips, self._stills)
        for row, (key, number, _) in enumerate(waiting):
            stored = {name: tensor[row].to(self._dtype) for name, tensor in moments.items()}
            if not all(bool(tensor.isfinite().all()) for tensor in stored.values()):
                self._part.sources[key] = {
                    "reason": str(Reason.not_finite),
                    "detail": f"its latents in bucket {bucket} are not finite in {self._dtype}",
                }
            for name, tensor in stored.items():
                self._part.tensors[f"{key}/{number}/{name}"] = tensor.clone()


def _num_pixels(bucket: Bucket) -> int:
    return bucket.frames * bucket.height * bucket.width


def config_hash(cfg: DataConfig, vae_fingerprint: str) -> str:
    """Hash everything besides the file itself that changes the latents of a source."""
    stills = {"condition_frames": cfg.condition_frames} if cfg.condition_frames else {}
    return key_of(
        {
            **stills,
            "pipeline": PIPELINE,
            "anchors": cfg.anchors,
            "durations": cfg.durations,
            "max_aspect": cfg.max_aspect,
            "bucket_stride": cfg.bucket_stride,
            "assign": str(cfg.assign),
            "max_upscale": cfg.max_upscale,
            "max_crop_loss": cfg.max_crop_loss,
            "max_fps": cfg.max_fps,
            "clip_start": str(cfg.clip_start),
            "integrity": str(cfg.integrity),
            "storage_dtype": str(cfg.storage_dtype),
            "vae": vae_fingerprint,
        }
    )


def source_key(digest: str, suffix: str, config: str) -> str:
    """Name the latents of a file by the SHA-256 of its bytes, suffix and :func:`config_hash`."""
    return key_of(digest, suffix.lower(), config)


def text_key(fingerprint: str, storage_dtype: str, caption: str, media: str) -> str:
    """Name the features of a caption by the text encoder's fingerprint and how they are stored."""
    kind = {"pipeline": PIPELINE, "storage_dtype": storage_dtype}
    return key_of(fingerprint, kind, media, caption)

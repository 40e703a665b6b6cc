"""What precompute does with a file: name it, decode it, encode it and its captions."""

import hashlib
import time
from collections.abc import Iterable
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
from hunyuan_train.encoders.text import TextEncoder, shown_beside
from hunyuan_train.engine.precompute_stages import Stages

PIPELINE = 2
"""Raise it when decoding, resizing, cropping or what parts record changes: stores are redone."""
MEDIA = ("image", "video")
_TEXT_BATCH = 32
_Text = tuple[str, str, str]
"""Media, caption, and the name of the picture beside it or nothing."""
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
        self.stages = Stages()
        self.encoded = 0
        self.texts = 0
        self.rejected = 0
        self.dtype: torch.dtype = getattr(torch, str(cfg.storage_dtype))
        self._table = cfg.bucket_table()

    def is_done(self, sources: list[Source]) -> bool:
        """Return whether the store has all that can be made of ``sources``, without reading one."""
        for source in sources:
            try:
                digest = self._known_digest(source)
            except OSError:
                continue  # missing: the merge reports it
            if not digest:
                return False
            key = self._key(source, digest)
            if key not in self.store.sources:
                return False
            if any(True for _ in self.missing_texts([(source, key)], [])):
                return False
        return True

    def source_key(self, source: Source, part: Part | None) -> str:
        """Name the latents of a file: a hash of its bytes, its suffix and all that shapes them.

        A file whose size and time are those of its last reading is not read again.

        Args:
            source: The file.
            part: Where a newly computed digest is recorded.

        Raises:
            OSError: The file cannot be read.
        """
        digest = self._known_digest(source)
        if not digest:
            stat, now = source.path.stat(), time.time_ns()
            with source.path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if part is not None:
                part.digests[source.file] = {
                    "size": stat.st_size,
                    "mtime_ns": stat.st_mtime_ns,
                    "hashed_ns": now,
                    "sha256": digest,
                }
        return self._key(source, digest)

    def _known_digest(self, source: Source) -> str:
        """Return the digest of a file that is as it was when it was last read; else empty."""
        stat = source.path.stat()
        _, known = self.store.digests.get(source.file, ("", {}))
        same = (known.get("size"), known.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
        return known["sha256"] if same and stat.st_mtime_ns + _RACY_NS < known["hashed_ns"] else ""

    def _key(self, source: Source, digest: str) -> str:
        return source_key(digest, source.path.suffix, self.config_hash)

    def text_key(self, caption: str, media: str, picture: str = "") -> str:
        """Name the features of a caption, with a picture if the encoder is shown one."""
        return text_key(self.text.fingerprint, str(self.cfg.storage_dtype), caption, media, picture)

    def picture(self, key: str, bucket: Bucket) -> str:
        """Name the first frame of a sample, if the text encoder is shown it; else empty.

        Args:
            key: That of the source.
            bucket: That of the sample.
        """
        return f"{key}/{bucket}" if self.text.sees_images and bucket.frames > 1 else ""

    def decode(self, source: Source) -> list[PixelSample] | MediaError | None:
        """Decode a file; None if it vanished or has no caption, which the merge reports."""
        try:
            if source.caption:
                return decode_samples(source.path, source.media, self.cfg, self._table)
            # A broken file without a caption is reported for being broken.
            check_readable(source.path, source.media)
            return None
        except MediaError as error:
            return error
        except OSError:
            return None
        except Exception as error:
            error.add_note(f"while decoding {source.path}")
            raise

    def missing_texts(
        self, keyed: Iterable[tuple[Source, str]], parts: list[Part]
    ) -> Iterable[_Text]:
        """Yield (media, caption, picture) that neither the store nor ``parts`` have; some twice.

        Args:
            keyed: Sources with their keys.
            parts: What is not in the store yet.
        """
        for source, key in keyed:
            entry = next((part.sources[key] for part in parts if key in part.sources), None)
            if entry is None:
                _, entry = self.store.sources.get(key, ("", {}))
            buckets = [Bucket.parse(row["bucket"]) for row in entry.get("rows", [])]
            for media, picture in {(b.media, self.picture(key, b)) for b in buckets}:
                for caption in source.captions:
                    text = self.text_key(caption, media, picture)
                    if text not in self.store.texts and not any(text in p.texts for p in parts):
                        yield media, caption, picture

    def encode_texts(
        self,
        keyed: list[tuple[Source, str]],
        part: Part,
        others: list[Part],
        pictures: dict[str, np.ndarray],
    ) -> None:
        """Encode into ``part`` the captions that the store and the parts ``others`` lack.

        Args:
            keyed: Sources with their keys.
            part: Where the latents of the sources are.
            others: Parts that will be in the store before it is complete.
            pictures: First frames, uint8 [H, W, 3], by :meth:`picture`.
        """
        parts = [part, *others]
        wanted = set(self.missing_texts(keyed, parts))
        for media in MEDIA:  # the features of "no text" too
            key = self.text_key("", media)
            if key not in self.store.texts and not any(key in p.texts for p in parts):
                wanted.add((media, "", ""))
        # A frame that is not there any more was of a file that changed: the merge reports it.
        known = {text for text in wanted if not text[2] or text[2] in pictures}
        for media in MEDIA:
            missing = sorted(text for text in known if text[0] == media)
            for start in range(0, len(missing), _TEXT_BATCH):
                batch = missing[start : start + _TEXT_BATCH]
                self._encode_text_batch(batch, media, part, pictures)

    def _encode_text_batch(
        self, texts: list[_Text], media: str, part: Part, pictures: dict[str, np.ndarray]
    ) -> None:
        captions = [caption for _, caption, _ in texts]
        with self.stages.time("text", len(captions)):
            if self.text.sees_images:
                images = [shown_beside(media, text[1], pictures.get(text[2])) for text in texts]
                features = self.text.encode(captions, media, images)
            else:
                features = self.text.encode(captions, media)
        for row, (_, caption, picture) in enumerate(texts):
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
            key = self.text_key(caption, media, picture)
            part.texts[key] = {"tokens": tokens}
            part.tensors[f"{key}/pooled"] = pooled.clone()
            part.tensors[f"{key}/states"] = states.clone()
            self.texts += bool(caption)


class LatentBatches:
    """Collects pixels per bucket and encodes a bucket's clips together.

    Waiting pixels are bounded too: when all buckets together hold several batches, all are encoded.
    """

    _WAITING_BATCHES = 4

    def __init__(self, worker: Worker, part: Part) -> None:
        self._vae = worker.vae
        self._stages = worker.stages
        self._dtype = worker.dtype
        self._max_pixels = worker.cfg.encode_pixels
        self._stills = worker.cfg.condition_frames
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
        with self._stages.time("vae", len(clips), sum(clip.nbytes for clip in clips)):
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


def text_key(
    fingerprint: str, storage_dtype: str, caption: str, media: str, picture: str = ""
) -> str:
    """Name the features of a caption by the text encoder's fingerprint and how they are stored.

    Those of an encoder that is shown a picture depend on that too.
    """
    kind = {"pipeline": PIPELINE, "storage_dtype": storage_dtype}
    seen = [picture] if picture else []
    return key_of(fingerprint, kind, media, caption, *seen)

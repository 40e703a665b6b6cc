"""Training straight from clips: decoded by processes, encoded on the rank's device as they come."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.child_process import as_sample_error
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.decode_job import decode_clip
from hunyuan_train.data.fetch import Request
from hunyuan_train.data.index import FORMAT, Index, SampleRow
from hunyuan_train.data.manifest import VIDEO_SUFFIXES
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.scan import index_sources, probe_key
from hunyuan_train.data.stills import encode_stills
from hunyuan_train.data.store import Sample, StoreMeta, Text

_KEPT_TEXTS = 64
"""Captions whose features are kept; 4 MiB each with the released text encoder."""


class PixelEncoder(Protocol):
    """The VAE as :class:`OnlineStore` uses it."""

    fingerprint: str
    scaling_factor: float

    def encode(self, clips: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Return mean and std, float32 [B, C, T, h, w], of clips uint8 [F, H, W, 3]."""
        ...


class CaptionEncoder(Protocol):
    """The text encoder as :class:`OnlineStore` uses it."""

    fingerprint: str
    text_length: int
    text_dim: int
    pooled_dim: int

    def encode(self, captions: list[str], media: str) -> Any:
        """Return ``states`` [B, L, D], ``mask`` bool [B, L] and ``pooled`` [B, P] of captions."""
        ...


class OnlineStore:
    """The samples of ``data.source``, encoded whenever they are drawn; a :class:`SampleStore`.

    All processes may be started at once: one looks into the files, the others wait for it.

    Args:
        cfg: Source, buckets, workers; ``latents`` is where the index is kept.
        vae: Pixels to latents.
        text: Captions to features.
        name: Key in ``data.sources``; empty for a single store.

    Raises:
        ValueError: A setting is missing, or no file is usable.
    """

    decode: Callable[..., Any] = staticmethod(decode_clip)

    def __init__(
        self, cfg: DataConfig, vae: PixelEncoder, text: CaptionEncoder, name: str = ""
    ) -> None:
        self.name = name
        self._cfg = cfg
        self._vae = vae
        self._text = text
        self._lock = threading.Lock()
        self._texts: OrderedDict[tuple[str, str], Text] = OrderedDict()
        self._empty: dict[str, Text] = {}
        folder = index_sources(cfg, text.text_length)
        root = Path(cfg.source)
        self.root = root if root.is_dir() else root.parent
        self.index = Index.open(folder)
        tiny = [np.zeros((1, 64, 64, 3), np.uint8)]
        self.meta = StoreMeta(
            format=FORMAT,
            index=folder.name,
            storage_dtype="float32",
            latent_channels=vae.encode(tiny)[0].shape[1],
            text_length=text.text_length,
            text_dim=text.text_dim,
            pooled_dim=text.pooled_dim,
            vae_fingerprint=vae.fingerprint,
            scaling_factor=vae.scaling_factor,
            text_fingerprint=text.fingerprint,
            config_hash=probe_key(cfg),
            empty_texts={},
            condition_frames=cfg.condition_frames,
        )

    def load(self, number: int, variant: int) -> Sample:
        """Decode and encode one row on the calling thread.

        Raises:
            SampleError: This sample cannot be used; it says why.
        """
        row = self.index.row(number)
        try:
            pixels = decode_clip(*self.job(row, 0))
        except Exception as error:
            raise as_sample_error(row.sample_id, error) from error
        future: Future[Any] = Future()
        request = Request(place=0, number=number, row=row, epoch=0, variant=variant, future=future)
        (sample,) = self.encode([request], [pixels])
        if isinstance(sample, SampleError):
            raise sample
        return sample

    def empty(self, media: str) -> Text:
        """Return the features of the empty caption; not to be changed."""
        with self._lock:
            if media not in self._empty:
                self._empty[media] = self._encode_texts([""], media)["", media]
            return self._empty[media]

    def job(self, row: SampleRow, epoch: int) -> tuple[Any, ...]:
        """Return the arguments of ``decode`` for a row; the same in every epoch."""
        path = self.root / row.source
        media = "video" if path.suffix.lower() in VIDEO_SUFFIXES else "image"
        return str(path), media, row.bucket, row.anchor, self._cfg

    def raw_bytes(self, bucket: Bucket) -> int:
        """Return the memory of the pixels of one sample."""
        return 3 * _num_pixels(bucket)

    def encode(self, requests: Sequence[Request], decoded: Sequence[Any]) -> list[Any]:
        """Return a Sample, or why there is none, for each row and its pixels; one bucket."""
        rows = [request.row for request in requests]
        outcomes: list[Sample | SampleError] = []
        with self._lock:
            captions = [request.row.texts[request.variant].caption for request in requests]
            texts = self._texts_of(captions, rows[0].media) if rows else []
            step = max(1, self._cfg.encode_pixels // _num_pixels(rows[0].bucket)) if rows else 1
            for first in range(0, len(rows), step):
                part = slice(first, first + step)
                outcomes += self._encode_part(rows[part], decoded[part], texts[part])
        return outcomes

    def texts(self, captions: list[str], media: str) -> list[Text]:
        """Return the features of captions of one medium."""
        with self._lock:
            return self._texts_of(captions, media)

    def remember(self, caption: str, media: str, text: Text) -> None:
        """Take features that are known already, so that they are not made once more."""
        with self._lock:
            self._texts[caption, media] = text
            self._texts.move_to_end((caption, media))

    def _encode_part(
        self, rows: list[SampleRow], decoded: Sequence[np.ndarray], texts: list[Text]
    ) -> list[Sample | SampleError]:
        bucket = rows[0].bucket
        shape = (bucket.frames, bucket.height, bucket.width, 3)
        outcomes: list[Sample | SampleError] = []
        fitting = [pixels for pixels in decoded if pixels.shape == shape]
        encoded: Iterator[tuple[Tensor, Tensor, Tensor | None]] = iter(())
        if fitting:
            stills = [None] * len(fitting)
            if self.meta.num_stills(bucket):
                stills = encode_stills(self._vae.encode, fitting, self.meta.condition_frames)
            encoded = zip(*self._vae.encode(fitting), stills, strict=True)
        for row, pixels, text in zip(rows, decoded, texts, strict=True):
            if pixels.shape != shape:
                detail = f"its pixels have shape {list(pixels.shape)} instead of {list(shape)}"
                outcomes.append(SampleError(row.sample_id, Reason.damaged, detail))
                continue
            mean, std, alone = next(encoded)
            if not len(text.states):
                detail = "no caption: the text encoder sees no token in it"
                outcomes.append(SampleError(row.sample_id, Reason.no_caption, detail))
            elif not all(bool(t.isfinite().all()) for t in (mean, std, alone) if t is not None):
                detail = f"its latents in bucket {bucket} are not finite"
                outcomes.append(SampleError(row.sample_id, Reason.not_finite, detail))
            else:
                outcomes.append(Sample(mean=mean, std=std, text=text, stills=alone))
        return outcomes

    def _texts_of(self, captions: list[str], media: str) -> list[Text]:
        """Return features by caption, encoding together those that are not kept."""
        keys = [(caption, media) for caption in captions]
        found = {key: self._texts[key] for key in keys if key in self._texts}
        found |= self._encode_texts(sorted({key[0] for key in keys if key not in found}), media)
        for key in keys:
            self._texts[key] = found[key]
            self._texts.move_to_end(key)
        while len(self._texts) > _KEPT_TEXTS:
            self._texts.popitem(last=False)
        return [found[key] for key in keys]

    def _encode_texts(self, captions: list[str], media: str) -> dict[tuple[str, str], Text]:
        if not captions:
            return {}
        features = self._text.encode(captions, media)
        texts: dict[tuple[str, str], Text] = {}
        for row, caption in enumerate(captions):
            tokens = int(features.mask[row].sum())
            if not bool(features.mask[row, :tokens].all()):
                raise ValueError(
                    f"the text encoder {self._text.fingerprint} pads caption {caption!r} on the "
                    "left; only right-padded features can be trained on"
                )
            states = features.states[row, :tokens].to("cpu", torch.float32, copy=True)
            pooled = features.pooled[row].to("cpu", torch.float32, copy=True)
            texts[caption, media] = Text(states=states, pooled=pooled)
        return texts


def _num_pixels(bucket: Bucket) -> int:
    return bucket.frames * bucket.height * bucket.width

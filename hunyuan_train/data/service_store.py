"""Training from what encoder processes make of clips: the store that ranks draw from."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.data.collate import check_sample
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import Index, SampleRow
from hunyuan_train.data.online import OnlineStore
from hunyuan_train.data.quarantine import SampleError
from hunyuan_train.data.service_board import Board
from hunyuan_train.data.service_client import Call, EncoderPool
from hunyuan_train.data.service_library import Library, as_sample, service_folder, stored_form
from hunyuan_train.data.store import Sample, StoreMeta, Text


class ServiceStore:
    """The samples of ``data.source``, encoded elsewhere; a :class:`SampleStore`.

    Its numbers are those that precompute stores: in ``data.storage_dtype``, whoever encoded them.

    Args:
        cfg: Cache, patience.
        index: Of ``data.source``.
        meta: What the encoders say of their samples.
        empty: ``image/pooled``, ``image/states`` and the same of ``video``: the empty caption.
        settings: Hash of all settings that the numbers depend on.
        library: What is finished; looked at before an encoder is asked.
        build: Makes what encodes on this rank if no encoder is left.
        name: Key in ``data.sources``; empty for a single store.
        closing: Ends the encoders that belong to this process.
    """

    def __init__(
        self,
        cfg: DataConfig,
        index: Index,
        meta: StoreMeta,
        empty: dict[str, Tensor],
        settings: str,
        library: Library,
        build: Callable[[], OnlineStore],
        name: str = "",
        closing: Callable[[], None] | None = None,
    ) -> None:
        self._closing = closing
        self.name = name
        self.index = index
        self.meta = meta
        self._cfg = cfg
        self._empty = {
            media: Text(
                states=empty[f"{media}/states"].float(), pooled=empty[f"{media}/pooled"].float()
            )
            for media in ("image", "video")
        }
        self._dtype: torch.dtype = getattr(torch, meta.storage_dtype)
        self._build = build
        self._own: OnlineStore | None = None
        self._lock = threading.Lock()
        self._library = library
        self.pool = EncoderPool(
            Board(service_folder(cfg)),
            cfg.service,
            settings,
            meta.index,
            check=lambda sample, row: check_sample(sample, row, meta),
            find=self._find if library.useful else None,
            fallback=self._encode_here,
            about=asdict(meta),
            finders=cfg.workers,
        )

    def load(self, number: int, variant: int) -> Sample:
        """Have one row encoded and wait for it; see :meth:`SampleStore.load`."""
        call = Call(self.index.row(number), number, variant)
        self.pool.submit(call)
        return call.future.result()

    def empty(self, media: str) -> Text:
        """Return the features of the empty caption; not to be changed."""
        return self._empty[media]

    def open_workers(self) -> "ServiceWorkers":
        """Return what asks for samples for one reader."""
        return ServiceWorkers(self)

    def counts(self) -> dict[str, int]:
        """Return where the samples of this rank came from, by name."""
        return {f"service_{name}": count for name, count in asdict(self.pool.counts).items()}

    def describe(self) -> str:
        """Return one line about encoders and cache."""
        encoders = self.pool.encoders
        names = ", ".join(f"{entry.device} of {entry.node}" for entry in encoders) or "none"
        counts = ", ".join(f"{count} {name}" for name, count in asdict(self.pool.counts).items())
        room = f"{self._cfg.service.cache_gib:g} GiB for the cache in {self._library.cache.folder}"
        return f"latent service: {len(encoders)} encoders connected ({names}); {counts}; {room}"

    def close(self) -> None:
        """Hang up on the encoders."""
        self.pool.close()
        if self._closing is not None:
            self._closing()

    def _find(self, row: SampleRow, variant: int) -> Sample | None:
        # A file whose digest is unknown is read by an encoder, on its own processor time.
        return self._library.sample(row, variant, read=False)

    def _encode_here(self, number: int, variant: int) -> Sample:
        """Encode a row on this rank, as encoders do.

        Raises:
            SampleError: It cannot be used.
            ValueError: The encoders cannot be loaded or are others than those before.
        """
        with self._lock:
            if self._own is None:
                own = self._build()
                for field in ("vae_fingerprint", "text_fingerprint", "index"):
                    ours, theirs = getattr(own.meta, field), getattr(self.meta, field)
                    if ours != theirs:
                        raise ValueError(
                            f"no encoder is left, and this rank would encode with another {field} "
                            f"({ours}) than theirs ({theirs}); start the run again"
                        )
                self._own = own
        sample = self._own.load(number, variant)
        tensors = stored_form(self.index.row(number), sample, self._dtype)
        if isinstance(tensors, SampleError):
            raise tensors
        return as_sample(tensors)


class ServiceWorkers:
    """The :class:`Workers` of one reader; the encoders go on when it is closed."""

    def __init__(self, store: ServiceStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._open: set[Future[Sample]] = set()
        self._closed = False

    def submit(self, name: str, *arguments: Any) -> "Future[Any]":
        """Ask for the sample ``name``: row number and caption; see :class:`Workers`."""
        number, variant = arguments
        call = Call(self._store.index.row(number), number, variant)
        with self._lock:
            if self._closed:
                call.future.cancel()
                return call.future
            self._open.add(call.future)
        call.future.add_done_callback(self._forget)
        self._store.pool.submit(call)
        return call.future

    def stop(self) -> None:
        """Cancel what is not done."""
        with self._lock:
            self._closed = True
            unfinished, self._open = self._open, set()
        for future in unfinished:
            future.cancel()

    def close(self) -> None:
        """Cancel what is not done."""
        self.stop()

    def _forget(self, future: "Future[Sample]") -> None:
        with self._lock:
            self._open.discard(future)

"""An encoder process: takes requests for rows from training ranks and answers with samples.

One thread looks for what is finished already and hands the rest to decoding processes, as far as
pixels fit into ``data.prefetch_gib``; the calling thread encodes what is decoded, rows of a bucket
together. Requests are a few bytes, and every client has only so many: nothing piles up here.
"""

import os
import secrets
import socket
import threading
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.online import OnlineStore
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.service_board import LOCAL, Board, Entry
from hunyuan_train.data.service_desk import Desk, Job, listening_socket
from hunyuan_train.data.service_greeting import Welcome
from hunyuan_train.data.service_library import Library, check_text, stored_form
from hunyuan_train.data.store import Sample, Text
from hunyuan_train.data.workers import ProcessWorkers

_TEXTS = 32
"""Captions encoded in one go where the latents are known."""


@dataclass(kw_only=True, slots=True)
class ServerCounts:
    """What an encoder process has done."""

    hits: int = 0
    """Answers that were finished already."""
    encoded: int = 0
    bad: int = 0
    """Samples that cannot be used."""


class EncoderServer:
    """Serves ``store`` until stopped; see the module.

    Args:
        store: Encodes.
        library: What is finished already.
        cfg: Workers, memory, and ``service``.
        settings: Hash of all settings that the numbers depend on; clients must have the same.
        board: Where it registers.
        host: Name under which others reach it; LOCAL serves this machine alone.
        device: Its device, in words.
    """

    def __init__(
        self,
        store: OnlineStore,
        library: Library,
        cfg: DataConfig,
        settings: str,
        board: Board,
        host: str = LOCAL,
        device: str = "cpu",
    ) -> None:
        self._store = store
        self._library = library
        self._cfg = cfg
        self._dtype: torch.dtype = getattr(torch, str(cfg.storage_dtype))
        self._limit = int(cfg.prefetch_gib * 2**30)
        self._open: list[Job] = []
        self._raw = 0
        self._stopped = False
        self._failure: BaseException | None = None
        self.counts = ServerCounts()
        self._workers = ProcessWorkers(store.decode, cfg.workers, cfg.worker_timeout_s)
        sock = listening_socket(host)
        self.entry = Entry(
            id=secrets.token_hex(4),
            host=host,
            port=sock.getsockname()[1],
            token=secrets.token_hex(32),
            settings=settings,
            node=socket.gethostname(),
            pid=os.getpid(),
            device=device,
        )
        welcome = Welcome(
            about={**asdict(store.meta), "storage_dtype": str(cfg.storage_dtype)},
            window=cfg.service.in_flight,
            empty=empty_captions(store, self._dtype),
        )
        silence_s = cfg.service.silence_s
        self.desk = Desk(sock, self.entry, board, store.index, welcome, silence_s, self._fail)
        self._changed = self.desk.changed
        self.desk.open()
        threading.Thread(target=self._find, name="data-find", daemon=True).start()

    def serve(self) -> None:
        """Encode until :meth:`stop`; raises whatever encoding raised."""
        try:
            while batch := self._take():
                self._encode(batch)
            if self._failure is not None:
                raise self._failure
        finally:
            self.stop()
            self.desk.close()
            self._workers.close()

    def stop(self) -> None:
        """Let :meth:`serve` return; a signal handler may call it."""
        self._stopped = True

    def _fail(self, error: BaseException) -> None:
        self._failure = error
        self.stop()

    def _find(self) -> None:
        """Answer what is finished already; have the rest decoded, as far as there is room."""
        try:
            while (job := self._next_fresh()) is not None:
                self._begin(job)
        except BaseException as error:
            if not self._stopped:
                self._fail(error)

    def _begin(self, job: Job) -> None:
        row, variant = job.request.row, job.request.variant
        text = self._library.text(row, variant)
        job.moments = self._library.moments(row, read=True)
        if job.moments is not None and text is not None:
            self.counts.hits += 1
            self._answer(job, {**job.moments, **self._features(text)}, hit=True)
            return
        future: Future[Any] | None = None
        if job.moments is None:
            job.key = self._library.source_key(row, read=True)
            if text is not None:
                self._store.remember(row.texts[variant].caption, row.media, text)
            future = self._workers.submit(row.sample_id, *self._store.job(row, 0))
            job.request = replace(job.request, future=future)
        with self._changed:
            self._open.append(job)
            self._changed.notify_all()
        if future is not None:
            future.add_done_callback(self._wake)

    def _wake(self, _: "Future[Any]") -> None:
        with self._changed:
            self._changed.notify_all()

    def _next_fresh(self) -> Job | None:
        """Wait for a job and for the memory of its pixels; None: stopped."""
        fresh = self.desk.fresh
        with self._changed:
            while not self._stopped:
                while fresh and not fresh[0].wanted():
                    self.desk.forget(fresh.popleft())
                if fresh:
                    needed = self._store.raw_bytes(fresh[0].request.row.bucket)
                    if not self._raw or self._raw + needed <= self._limit:
                        job = fresh.popleft()
                        job.raw_bytes = needed
                        self._raw += needed
                        return job
                self._changed.wait(0.5)
            return None

    def _take(self) -> list[Job]:
        """Wait for decoded rows of one bucket; empty: stopped."""
        with self._changed:
            while not self._stopped:
                ready = [job for job in self._open if job.done()]
                if not ready:
                    self._changed.wait(0.5)
                    continue
                bucket, known = ready[0].request.row.bucket, ready[0].moments is not None
                pixels = self._store.raw_bytes(bucket) // 3
                most = _TEXTS if known else max(1, self._cfg.encode_pixels // pixels)
                alike = [
                    job
                    for job in ready
                    if job.request.row.bucket == bucket and (job.moments is not None) == known
                ]
                batch = alike[:most]
                self._open = [job for job in self._open if job not in batch]
                return batch
            return []

    def _encode(self, batch: list[Job]) -> None:
        if batch[0].moments is not None:
            self._encode_texts(batch)
            return
        decoded: list[tuple[Job, Any]] = []
        for job in batch:
            try:
                decoded.append((job, job.request.future.result()))
            except SampleError as error:
                self._refuse(job, error)
            except CancelledError:
                return  # the decoding processes were stopped
        found = self._store.encode([job.request for job, _ in decoded], [p for _, p in decoded])
        for (job, _), sample in zip(decoded, found, strict=True):
            row = job.request.row
            tensors = sample
            if isinstance(sample, Sample):
                tensors = stored_form(row, sample, self._dtype)
            if isinstance(tensors, SampleError):
                self._refuse(job, tensors)
                continue
            assert isinstance(tensors, dict)
            self.counts.encoded += 1
            self._library.keep(job.key, row, job.request.variant, tensors)
            self._answer(job, tensors, hit=False)

    def _encode_texts(self, batch: list[Job]) -> None:
        captions = [job.request.row.texts[job.request.variant].caption for job in batch]
        texts = self._store.texts(captions, batch[0].request.row.media)
        for job, text in zip(batch, texts, strict=True):
            row = job.request.row
            if not len(text.states):
                detail = "no caption: the text encoder sees no token in it"
                self._refuse(job, SampleError(row.sample_id, Reason.no_caption, detail))
                continue
            features = self._features(text)
            check_text(row, features)
            assert job.moments is not None
            self.counts.encoded += 1
            self._library.keep_text(row, job.request.variant, features)
            self._answer(job, {**job.moments, **features}, hit=False)

    def _features(self, text: Text) -> dict[str, Tensor]:
        return {"pooled": text.pooled.to(self._dtype), "states": text.states.to(self._dtype)}

    def _answer(self, job: Job, tensors: dict[str, Tensor], *, hit: bool) -> None:
        self._free(job)
        self.desk.answer(job, {"op": "sample", "hit": hit}, tensors)

    def _refuse(self, job: Job, error: SampleError) -> None:
        self.counts.bad += 1
        self._free(job)
        header = {"op": "bad", "reason": str(error.reason), "detail": error.detail}
        self.desk.answer(job, header)

    def _free(self, job: Job) -> None:
        with self._changed:
            self._raw -= job.raw_bytes
            job.raw_bytes = 0
            self._changed.notify_all()


def empty_captions(store: OnlineStore, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the features of the empty caption of both media, as a :class:`Welcome` has them."""
    found: dict[str, Tensor] = {}
    for media in ("image", "video"):
        text = store.empty(media)
        found[f"{media}/pooled"] = text.pooled.to(dtype)
        found[f"{media}/states"] = text.states.to(dtype)
    return found

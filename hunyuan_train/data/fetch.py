"""Samples of all stores through workers: threads read what is stored, processes decode clips."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import MicroBatch, check_any, choose_caption
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import SampleRow
from hunyuan_train.data.quarantine import SampleError
from hunyuan_train.data.store import RowStore, Sample, SampleStore
from hunyuan_train.data.workers import ProcessWorkers, ThreadWorkers, Workers


@runtime_checkable
class EncodingStore(Protocol):
    """A store whose samples are decoded in a process, then encoded on the rank's device."""

    decode: Callable[..., Any]
    """What a process runs for one sample; it does not import torch."""

    def job(self, row: SampleRow, epoch: int) -> tuple[Any, ...]:
        """Return the arguments of ``decode`` for a row in an epoch."""
        ...

    def raw_bytes(self, bucket: Bucket) -> int:
        """Return the memory of one decoded sample that waits to be encoded."""
        ...

    def encode(self, requests: "list[Request]", decoded: list[Any]) -> list[Sample | SampleError]:
        """Turn what ``decode`` returned for samples of one bucket into samples."""
        ...


@runtime_checkable
class ServedStore(Protocol):
    """A store whose samples are made by other processes, as many at a time as these take."""

    def open_workers(self) -> Workers:
        """Return what asks for samples, by row number and caption."""
        ...


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Request:
    """One sample that was asked for, and its place in a batch."""

    place: int
    number: int
    """Row of the store."""
    row: SampleRow
    epoch: int
    variant: int
    """Which of its captions."""
    future: "Future[Any]"


class Fetcher:
    """Runs the workers of a rank.

    Args:
        stores: The stores; samples are asked for by their number in this list.
        cfg: Number of workers, and the time they have for one sample.
    """

    def __init__(self, stores: Sequence[RowStore], cfg: DataConfig) -> None:
        self._stores = stores
        self._workers: list[Workers] = []
        threads: ThreadWorkers | None = None
        for store in stores:
            if isinstance(store, EncodingStore):
                processes = ProcessWorkers(store.decode, cfg.workers, cfg.worker_timeout_s)
                self._workers.append(processes)
            elif isinstance(store, ServedStore):
                self._workers.append(store.open_workers())
            else:
                threads = threads or ThreadWorkers(_load, cfg.workers, cfg.worker_timeout_s)
                self._workers.append(threads)

    @property
    def served(self) -> bool:
        """Whether a store bounds by itself how many of its samples are made at a time."""
        return any(isinstance(store, ServedStore) for store in self._stores)

    def ask(self, source: int, number: int, place: int, epoch: int, seed: int) -> Request:
        """Have a worker load row ``number`` of a store, for ``place`` of a batch."""
        store = self._stores[source]
        row = store.index.row(number)
        variant = choose_caption(row, seed, epoch)
        if isinstance(store, EncodingStore):
            arguments = store.job(row, epoch)
        elif isinstance(store, ServedStore):
            arguments = (number, variant)
        else:
            arguments = (store, number, variant)
        future = self._workers[source].submit(row.sample_id, *arguments)
        return Request(
            place=place, number=number, row=row, epoch=epoch, variant=variant, future=future
        )

    def fill(
        self, source: int, batch: MicroBatch, requests: list[Request]
    ) -> dict[int, SampleError]:
        """Wait for samples and put the good ones into their batch.

        Returns:
            What is wrong with the others, by place.

        Raises:
            CancelledError: The workers were stopped.
        """
        store = self._stores[source]
        found = {request: _outcome(request.future) for request in requests}
        if isinstance(store, EncodingStore):
            asked = [key for key, value in found.items() if not isinstance(value, SampleError)]
            encoded = store.encode(asked, [found[request] for request in asked])
            found.update(zip(asked, encoded, strict=True))
        bad: dict[int, SampleError] = {}
        for request, sample in found.items():
            try:
                if isinstance(sample, SampleError):
                    raise sample
                check_any(store, sample, request.row)
            except SampleError as error:
                bad[request.place] = error
            else:
                batch.put(request.place, request.row, request.epoch, request.variant, sample)
        return bad

    def raw_bytes(self, source: int, bucket: Bucket) -> int:
        """Return the memory that one sample takes before it is in its batch."""
        store = self._stores[source]
        return store.raw_bytes(bucket) if isinstance(store, EncodingStore) else 0

    def stop(self) -> None:
        """Cancel everything without waiting for it."""
        for workers in self._workers:
            workers.stop()

    def close(self) -> None:
        """Stop the workers and wait for them."""
        self.stop()
        for workers in self._workers:
            workers.close()


def _load(store: SampleStore, number: int, variant: int) -> Sample:
    return store.load(number, variant)


def _outcome(future: "Future[Any]") -> Any:
    """Return what a worker found, a bad sample included; other errors are raised."""
    try:
        return future.result()
    except SampleError as error:
        return error

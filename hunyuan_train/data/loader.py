"""The loader of a rank: its micro-batches of every global step, read ahead in the background."""

import queue
import threading
import weakref
from typing import Any

from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import Batch, collate
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.index import LatentStore, SampleRow
from hunyuan_train.data.sampler import BatchStream, select_rows

_POLL_S = 0.2


class BucketLoader:
    """Serves rank ``rank`` of ``world_size`` from the global stream of micro-batches.

    A global step consumes ``world_size * num_micro`` consecutive micro-batches; this rank takes
    every ``world_size``-th of them. The position counts consumed micro-batches of the whole stream,
    so a run that resumes on another number of ranks goes on where it stopped, and batches that were
    read ahead but not consumed do not count.

    Args:
        store: The precomputed samples.
        cfg: Selection, batch sizes, shuffling, read-ahead.
        seed: Run seed.
        rank: This rank among those with distinct data.
        world_size: Number of ranks with distinct data.

    Raises:
        ValueError: The selection holds no sample.
    """

    def __init__(
        self, store: LatentStore, cfg: DataConfig, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        store.enable_cache(cfg.cache_gib)
        self._store = store
        self._rows = select_rows(store.rows, cfg, str(store.folder))
        self._stream = BatchStream(self._rows, cfg, seed)
        self._rank = rank
        self._world_size = world_size
        self._read_ahead = cfg.prefetch_batches
        self._position = 0
        self._reader: _Reader | None = None

    def next_step(self, num_micro: int) -> list[Batch]:
        """Return this rank's ``num_micro`` micro-batches of the next global step.

        Raises:
            ValueError: A shard is missing or damaged; whatever the background reader met is raised
                here.
        """
        if self._reader is None:
            self._reader = _Reader(
                self._store,
                self._rows,
                self._stream,
                self._position + self._rank,
                self._world_size,
                self._read_ahead,
            )
            weakref.finalize(self, self._reader.stop.set)
        batches = [self._reader.next() for _ in range(num_micro)]
        self._position += num_micro * self._world_size
        return batches

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the global stream and what the stream depends on."""
        return {"position": self._position, "fingerprint": self._stream.fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a saved position, on any number of ranks.

        Raises:
            ValueError: The samples, batch sizes or seed differ from those of the saved stream.
        """
        if state["fingerprint"] != self._stream.fingerprint:
            then, now = (
                text.split(" ") for text in (state["fingerprint"], self._stream.fingerprint)
            )
            differing = [
                f"{old} then, {new} now" for old, new in zip(then, now, strict=False) if old != new
            ]
            raise ValueError(
                f"the data differ from those of the checkpoint ({'; '.join(differing)}), so its "
                f"position has no meaning; restore data.latents={self._store.folder}, the data "
                "selection, batch sizes and seed, or start a new run from the weights"
            )
        self.close()
        self._position = int(state["position"])

    def close(self) -> None:
        """Stop reading ahead; the next step starts again at the current position."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets of the selected samples."""
        return list(self._stream.members)

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of one epoch over all ranks."""
        return self._stream.batches_per_epoch

    def describe(self) -> str:
        """Return the bucket table as text, one line per bucket and a total."""
        lines = [f"{'bucket':>14} {'samples':>8} {'tokens':>7} {'batch':>6} {'batches/epoch':>14}"]
        for bucket, members in self._stream.members.items():
            lines.append(
                f"{bucket!s:>14} {len(members):>8} {bucket.tokens:>7} "
                f"{self._stream.batch_sizes[bucket]:>6} {self._stream.num_batches(bucket):>14}"
            )
        lines.append(
            f"{'total':>14} {len(self._rows):>8} {'':>7} {'':>6} {self.batches_per_epoch:>14}"
        )
        return "\n".join(lines)


class _Reader:
    """Reads every ``stride``-th micro-batch from ``start`` on a thread, a bounded number ahead."""

    def __init__(
        self,
        store: LatentStore,
        rows: list[SampleRow],
        stream: BatchStream,
        start: int,
        stride: int,
        ahead: int,
    ) -> None:
        self.stop = threading.Event()
        self._queue: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=ahead)
        self._failure: BaseException | None = None
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(store, rows, stream, start, stride, self._queue, self.stop),
            name="data-reader",
            daemon=True,
        )
        self._thread.start()

    def next(self) -> Batch:
        """Return the next micro-batch, or raise what stopped the thread, again on every call."""
        while self._failure is None:
            try:
                item = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                if not self._thread.is_alive() and self._queue.empty():
                    self._failure = RuntimeError("the data reader thread ended without an error")
                continue
            if isinstance(item, Batch):
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self.stop.set()
        self._thread.join()


def _read_ahead(
    store: LatentStore,
    rows: list[SampleRow],
    stream: BatchStream,
    position: int,
    stride: int,
    batches: "queue.Queue[Batch | BaseException]",
    stop: threading.Event,
) -> None:
    """Fill ``batches`` until ``stop``; an exception is passed on as the last item."""
    while not stop.is_set():
        item: Batch | BaseException
        try:
            planned = stream[position]
            item = collate(store, [rows[index] for index in planned.rows], planned.epoch)
        except BaseException as error:  # raised again by next(), never dropped
            item = error
        while not stop.is_set():
            try:
                batches.put(item, timeout=_POLL_S)
                break
            except queue.Full:
                continue
        if not isinstance(item, Batch):
            return
        position += stride

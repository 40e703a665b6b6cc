"""The units of precompute: claimed, decoded ahead, encoded, and committed beside the next ones."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from hunyuan_train.data.claims import Claim
from hunyuan_train.data.dataset import PixelSample
from hunyuan_train.data.manifest import Source
from hunyuan_train.data.parts import Part
from hunyuan_train.data.quarantine import MediaError
from hunyuan_train.engine.precompute_work import LatentBatches, Worker

_RETRY_S = 0.2
_COMMITS = 1
"""Units that wait to be written at most; each holds its latents in memory."""

Decoded = tuple[str, list[PixelSample] | MediaError | None]
"""Key of a source, empty if it cannot be read, and what decoding gave; None: nothing to add."""


@dataclass(kw_only=True, slots=True)
class Unit:
    """Work in progress on some sources, committed in one go."""

    claim: Claim
    part: Part
    batches: LatentBatches
    keyed: list[tuple[Source, str]] = field(default_factory=list)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    """First frames that the text encoder is to see, by name."""


@dataclass(slots=True)
class _Commit:
    unit: Unit
    future: Future[None]


class Pipeline:
    """Takes units as long as there are any, so that the encoders never wait for disks.

    Files are read, hashed and decoded on threads a few files ahead, across the border of units;
    parts are written on another thread. So a process holds the claims of a few units at a time.

    Args:
        worker: The encoders and the store.
        moved: Called now and then: after each source, and while other processes hold the rest.
    """

    def __init__(self, worker: Worker, moved: Callable[[], None]) -> None:
        self._worker = worker
        self._store = worker.store
        self._moved = moved
        self._ahead = worker.cfg.decode_workers
        self._commits: deque[_Commit] = deque()

    def run(self, waiting: deque[tuple[str, list[Source]]]) -> None:
        """Return when everything in ``waiting`` is in the store, by whichever process.

        Raises:
            ValueError: The text encoder's features cannot be stored.
            OSError: The store cannot be written.
        """
        jobs = self._jobs(waiting)
        running: deque[tuple[Unit, Source | None, Future[Decoded] | None]] = deque()
        with (
            ThreadPoolExecutor(self._ahead, "decode") as decoders,
            ThreadPoolExecutor(1, "commit") as committer,
        ):
            finished = False
            while running or not finished:
                while not finished and len(running) <= self._ahead:
                    try:
                        job = next(jobs)
                    except StopIteration:
                        finished = True
                        break
                    if job is None:
                        break
                    unit, source = job
                    future = decoders.submit(self._prepare, unit, source) if source else None
                    running.append((unit, source, future))
                if running:
                    self._consume(*running.popleft(), committer)
                elif not finished:
                    # Others work on the rest. They finish it, or are killed and leave it to us.
                    self._settle(0)
                    time.sleep(_RETRY_S)
                self._moved()
            self._settle(0)

    def _jobs(
        self, waiting: deque[tuple[str, list[Source]]]
    ) -> Iterator[tuple[Unit, Source | None] | None]:
        """Yield the sources of units as these are claimed, and None in place of a unit's end.

        A bare None means that other processes hold all that is left at the moment.
        """
        refused = 0
        while waiting:
            name, sources = waiting.popleft()
            claim = self._store.claims.take(name)
            if claim is None:
                waiting.append((name, sources))
                refused += 1
                if refused >= len(waiting):
                    refused = 0
                    yield None
                continue
            refused = 0
            for part_name in claim.notes:
                self._store.read(part_name)  # the list of the folder may lag behind
            self._store.refresh()
            part = Part()
            unit = Unit(claim=claim, part=part, batches=LatentBatches(self._worker, part))
            for source in sources:
                yield unit, source
            yield unit, None

    def _prepare(self, unit: Unit, source: Source) -> Decoded:
        worker = self._worker
        started = time.perf_counter()
        try:
            key = worker.source_key(source, unit.part)
            stored = key in worker.store.sources
            lacking = worker.missing_texts([(source, key)], []) if stored else ()
            if stored and not any(picture for _, _, picture in lacking):
                return key, None
            nbytes = source.path.stat().st_size
        except OSError:
            return "", None  # missing or unreadable: the merge reports it
        result = worker.decode(source)
        worker.stages.add("decode", time.perf_counter() - started, 1, nbytes)
        return key, result

    def _consume(
        self,
        unit: Unit,
        source: Source | None,
        future: Future[Decoded] | None,
        committer: ThreadPoolExecutor,
    ) -> None:
        if source is None or future is None:
            unit.batches.flush()
            others = [commit.unit.part for commit in self._commits]
            self._worker.encode_texts(unit.keyed, unit.part, others, unit.pictures)
            self._commits.append(_Commit(unit, committer.submit(self._commit, unit)))
            self._settle(_COMMITS)
            return
        with self._worker.stages.time("wait"):
            key, result = future.result()
        if not key:
            return
        unit.keyed.append((source, key))
        # The same bytes may be in the unit, or in one that is being written, under another name.
        parts = [unit.part, *(commit.unit.part for commit in self._commits)]
        if isinstance(result, list) and self._worker.text.sees_images:
            shown = {self._worker.picture(key, sample.bucket): sample for sample in result}
            unit.pictures |= {name: shown[name].pixels[0].copy() for name in shown if name}
        known = key in self._store.sources or any(key in part.sources for part in parts)
        if result is None or known:
            return
        if isinstance(result, MediaError):
            unit.part.sources[key] = {"reason": str(result.reason), "detail": result.detail}
        else:
            unit.batches.add(key, result)

    def _commit(self, unit: Unit) -> None:
        part, name = unit.part, ""
        if part.sources or part.texts or part.digests:
            nbytes = sum(tensor.nbytes for tensor in part.tensors.values())
            with self._worker.stages.time("write", len(part.sources), nbytes):
                name = self._store.commit(part)
        self._store.claims.release(unit.claim, name)

    def _settle(self, most: int) -> None:
        """Wait until at most ``most`` units are being written; count those that are."""
        while self._commits and (len(self._commits) > most or self._commits[0].future.done()):
            commit = self._commits[0]
            commit.future.result()
            self._commits.popleft()
            sources = commit.unit.part.sources.values()
            bad = sum("reason" in entry for entry in sources)
            self._worker.rejected += bad
            self._worker.encoded += len(sources) - bad

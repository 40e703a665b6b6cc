"""Reading ahead: the units of coming updates, loaded in their order on a background thread."""

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

from hunyuan_train.data.balance import Balance, Unit
from hunyuan_train.data.collate import MicroBatch, bytes_of_batch, new_batch
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.fetch import Fetcher, Request
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.data.quarantine import SampleError
from hunyuan_train.data.store import RowStore

_MOST_READY = 8
"""Updates that may wait to be taken."""
_MOST_SERVED = 64
"""Units that may wait for encoders, which may be many."""


@dataclass(kw_only=True, slots=True)
class LoadedUnit:
    """One micro-batch of this rank; the places of bad samples hold zeros."""

    unit: Unit
    batch: MicroBatch
    requests: list[Request]
    """By place."""
    bad: dict[int, SampleError]
    """By place."""
    cleared: bool = False
    """It has no usable sample left, and its batch no weight."""


@dataclass(kw_only=True, slots=True)
class LoadedStep:
    """This rank's part of one update."""

    units: list[LoadedUnit] = field(default_factory=list)
    state: dict[str, Any]
    """State of the planner after this update."""
    balance: Balance
    nbytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Planned:
    """A unit that comes next."""

    unit: Unit
    step: LoadedStep
    last: bool
    """It completes its step."""
    batch_bytes: int
    raw_bytes: int
    """Of its decoded clips, until they are encoded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flight:
    """A unit that workers are loading."""

    planned: _Planned
    requests: list[Request]


class StepReader:
    """Loads the updates of one rank ahead of training, in the order of the plan.

    What waits is bounded by ``data.prefetch_gib``, decoded clips included, but for one unit at a
    time until one update is complete: training never waits for memory that it holds itself. More
    than a few updates are never ahead, so that small ones do not keep the machine busy for minutes.

    Args:
        stores: The stores of the planner's cells.
        planner: Where the first update to load comes next; used from two threads, see ``lock``.
        cfg: Workers and memory.
        seed: Run seed.
        rank: This rank among those with distinct data.
        ranks: Number of ranks with distinct data.
    """

    def __init__(
        self,
        stores: Sequence[RowStore],
        planner: StepPlanner,
        cfg: DataConfig,
        seed: int,
        rank: int,
        ranks: int,
    ) -> None:
        self._stores = stores
        self._planner = planner
        self._seed = seed
        self._rank, self._ranks = rank, ranks
        self._limit = int(cfg.prefetch_gib * 2**30)
        self.lock = threading.Lock()
        """Held while the planner is used."""
        self._changed = threading.Condition()
        self._ready: deque[LoadedStep] = deque()
        self._failure: BaseException | None = None
        self._stopped = False
        self.queued_bytes = 0
        """Memory of what is loaded or being loaded, and not taken yet."""
        self.fetcher = Fetcher(stores, cfg)
        self._most_flights = _MOST_SERVED if self.fetcher.served else 2 * cfg.workers
        self._thread = threading.Thread(target=self._run, name="data-reader", daemon=True)
        self._thread.start()

    def next(self) -> LoadedStep:
        """Wait for the next update, or raise what stopped the thread.

        Raises:
            ValueError: The data have an end, and it is reached.
        """
        with self._changed:
            while not self._ready and self._failure is None:
                self._changed.wait()
            if not self._ready:
                assert self._failure is not None
                raise self._failure
            step = self._ready.popleft()
            self.queued_bytes -= step.nbytes
            self._changed.notify_all()
            return step

    def ask(self, unit: Unit, place: int, number: int, epoch: int) -> Request:
        """Have a worker load a row for ``place`` of a unit."""
        source = self._planner.cells[unit.cell].store
        return self.fetcher.ask(source, number, place, epoch, self._seed)

    def fill(
        self, unit: Unit, batch: MicroBatch, requests: list[Request]
    ) -> dict[int, SampleError]:
        """Wait for samples and put them into the batch of ``unit``; return the bad ones."""
        return self.fetcher.fill(self._planner.cells[unit.cell].store, batch, requests)

    def stop(self) -> None:
        """Let thread and workers end, without waiting for them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.fetcher.stop()

    def close(self) -> None:
        """Stop thread and workers and wait for them."""
        self.stop()
        self._thread.join()
        self.fetcher.close()

    def _run(self) -> None:
        failure: BaseException | None = None
        try:
            self._read_ahead()
        except CancelledError:
            failure = RuntimeError("the data reader was stopped")
        except BaseException as error:  # raised again by next(), never dropped
            failure = error
        with self._changed:
            self._failure = failure or RuntimeError("the data reader was stopped")
            self._changed.notify_all()
        # The workers go on: updates that are ready may have bad samples to replace.

    def _read_ahead(self) -> None:
        """Load until stopped. An end of the data is raised when all before it is loaded."""
        flights: deque[_Flight] = deque()
        coming = self._plan()
        upcoming: _Planned | None = None
        end: Exception | None = None
        while not self._stopped:
            if upcoming is None and end is None:
                try:
                    upcoming = next(coming)
                except Exception as error:
                    end = error
            few = len(flights) < self._most_flights
            if upcoming is not None and few and self._room(upcoming, idle=not flights):
                flights.append(self._launch(upcoming))
                upcoming = None
            elif flights:
                self._land(flights.popleft())
            elif end is not None:
                raise end
            else:
                with self._changed:
                    if self._ready and not self._stopped:
                        self._changed.wait()

    def _plan(self) -> Iterator[_Planned]:
        while True:
            with self.lock:
                plan = self._planner.next_step()
                state = self._planner.state_dict()
            units = plan.assign(self._ranks)[self._rank]
            step = LoadedStep(state=state, balance=plan.balance(self._ranks))
            for number, unit in enumerate(units, start=1):
                cell = self._planner.cells[unit.cell]
                yield _Planned(
                    unit=unit,
                    step=step,
                    last=number == len(units),
                    batch_bytes=bytes_of_batch(self._stores[cell.store], cell.bucket, unit.count),
                    raw_bytes=unit.count * self.fetcher.raw_bytes(cell.store, cell.bucket),
                )

    def _room(self, planned: _Planned, *, idle: bool) -> bool:
        with self._changed:
            if len(self._ready) >= _MOST_READY:
                return False
            needed = planned.batch_bytes + planned.raw_bytes
            if self.queued_bytes + needed > self._limit and not (idle and not self._ready):
                return False
            self.queued_bytes += needed
            return True

    def _launch(self, planned: _Planned) -> _Flight:
        with self.lock:
            rows = self._planner.rows(planned.unit)
        requests = [
            self.ask(planned.unit, place, number, epoch)
            for place, (number, epoch) in enumerate(rows)
        ]
        return _Flight(planned=planned, requests=requests)

    def _land(self, flight: _Flight) -> None:
        planned, unit = flight.planned, flight.planned.unit
        cell = self._planner.cells[unit.cell]
        batch = new_batch(self._stores[cell.store], cell.bucket, unit.count, unit.weight)
        bad = self.fill(unit, batch, flight.requests)
        step = planned.step
        step.units.append(LoadedUnit(unit=unit, batch=batch, requests=flight.requests, bad=bad))
        step.nbytes += planned.batch_bytes
        with self._changed:
            self.queued_bytes -= planned.raw_bytes
            if planned.last:
                self._ready.append(step)
            self._changed.notify_all()

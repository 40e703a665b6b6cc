"""The loader of a rank: its micro-batches of every update, read ahead, bad samples replaced."""

import json
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hunyuan_train.data.balance import Balance
from hunyuan_train.data.buckets import Bucket
from hunyuan_train.data.collate import MicroBatch
from hunyuan_train.data.config import DataConfig
from hunyuan_train.data.fetch import Request
from hunyuan_train.data.index import SampleRow
from hunyuan_train.data.planner import StepPlanner
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.reader import LoadedStep, LoadedUnit, StepReader
from hunyuan_train.data.service_store import ServiceStore
from hunyuan_train.data.store import RowStore

_MIN_SAMPLES = 100
"""Samples after which data.max_bad_share is compared; before, one bad sample would be too many."""
_MAX_ATTEMPTS = 32
"""Rows that may be bad in turn in one place before their cell is called unusable."""
_MOST_REFUSALS = 5
"""Excluded updates from which on data.max_bad_share counts their samples: a single one may be a
large part of a small store."""
_ELSEWHERE = "another rank that shares its batch could not use it"


class BucketLoader:
    """Serves rank ``rank`` of ``world_size`` with its units of every planned update.

    The state is that of the last update that was taken: a run that resumes, on any number of ranks,
    goes on where it stopped, and what was only read ahead does not count. Samples that training
    wants never to meet again, see :meth:`exclude`, are part of it.

    Ranks that share a batch need the same samples. So in every step they first agree which samples
    are bad, and all replace them by the same others of the cell, until all are good everywhere.

    Args:
        stores: The stores that the planner's cells count.
        planner: Draws the updates; the loader owns it from here on.
        cfg: Workers, read-ahead, tolerated share of bad samples.
        seed: Run seed.
        rank: This rank among those with distinct data.
        world_size: Number of ranks with distinct data.
        agree: Takes a mask, bool [n], and returns its element-wise OR over the ranks that share the
            batch; called on the thread that calls :meth:`next_step`, equally often on all of them.
            None for a rank alone.
        quarantine: JSONL file for bad samples; None writes none.
    """

    def __init__(
        self,
        stores: Sequence[RowStore],
        planner: StepPlanner,
        cfg: DataConfig,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        agree: Callable[[Tensor], Tensor] | None = None,
        quarantine: Path | None = None,
    ) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self._stores = stores
        self._planner = planner
        self._cfg = cfg
        self._seed = seed
        self._rank, self._world_size = rank, world_size
        self._agree = agree
        self._bad = _BadSamples(quarantine)
        self._first = self._state = planner.state_dict()
        self._excluded: dict[str, str] = {}
        self._reader: StepReader | None = None
        self._failure: Exception | None = None
        self._drawn = 0
        self.balance = Balance(1.0, 1.0)
        """Predicted balance of the last update."""

    def next_step(self) -> list[MicroBatch]:
        """Return this rank's micro-batches of the next update.

        Raises:
            ValueError: Too many samples are bad, or all of a cell, or the data have an end and it
                is reached. This and whatever the reader met is raised again on every call.
        """
        if self._failure is not None:
            raise self._failure
        try:
            step = self._start().next()
            self._replace_bad(step)
        except Exception as error:
            self._failure = error
            raise
        self._state = step.state
        self.balance = step.balance
        return [unit.batch for unit in step.units]

    def state_dict(self) -> dict[str, Any]:
        """Return the planner's state after the last update that was taken, ready for JSON.

        With the names of excluded samples, by the reason why; the same on all ranks.
        """
        if not self._excluded:
            return self._state
        excluded: dict[str, list[str]] = {}
        for name, why in self._excluded.items():
            excluded.setdefault(why, []).append(name)
        return {**self._state, "excluded": excluded}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after a saved update, on any number of ranks.

        What this loader has excluded since then stays excluded: a run goes back because of it.

        Raises:
            ValueError: The data, their selection or the seed differ from those of the saved run.
        """
        self.close()
        self._planner.load_state_dict(state)
        self._state = {key: value for key, value in state.items() if key != "excluded"}
        saved = {name: why for why, names in state.get("excluded", {}).items() for name in names}
        self._excluded = saved | self._excluded
        self._failure = None

    def restart(self) -> None:
        """Begin again with the first update; what is excluded stays so."""
        self.load_state_dict(self._first)

    def exclude(self, names: Iterable[str], why: str) -> None:
        """Replace these samples by others of their cells from now on, wherever they come up.

        What is read ahead still has them, so :meth:`load_state_dict` or :meth:`restart` has to
        follow. All ranks exclude the same.

        Args:
            names: Ids; the samples of all sources with such an id are meant.
            why: One clause, other than those of earlier calls.

        Raises:
            ValueError: Nothing would be left, or more than data.max_bad_share would be excluded
                after more than a handful of calls.
        """
        self._excluded |= {name: why for name in sorted(names) if name not in self._excluded}
        lost, total = len(self._excluded), sum(cell.count for cell in self._planner.cells)
        times, limit = len(set(self._excluded.values())), self._cfg.max_bad_share
        if lost >= total or (times > _MOST_REFUSALS and lost > limit * total):
            raise ValueError(
                f"{lost} of the {total} selected samples were in {times} refused updates (the last "
                f"one: {why}), and data.max_bad_share={limit:g}; look at the learning rate and at "
                "resilience.spike_factor"
            )

    def close(self) -> None:
        """Stop reading ahead; the next step starts again after the last one that was taken."""
        if self._reader is not None:
            self._abandoned.detach()
            self._reader.close()
            self._reader = None

    @property
    def replaced(self) -> int:
        """Samples that were bad and replaced since the loader was made."""
        return self._bad.total

    @property
    def excluded(self) -> int:
        """Samples that are not drawn any more, see :meth:`exclude`."""
        return len(self._excluded)

    @property
    def queued_bytes(self) -> int:
        """Memory of what is read ahead and not taken yet."""
        return self._reader.queued_bytes if self._reader is not None else 0

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets of the selected samples."""
        return sorted({cell.bucket for cell in self._planner.cells})

    @property
    def kinds(self) -> list[tuple[str, Bucket]]:
        """Source and bucket of the selected samples, every pair that occurs."""
        return sorted({(cell.source, cell.bucket) for cell in self._planner.cells})

    def describe(self) -> str:
        """Return what is drawn as a table: a line per bucket, the cheapest folded, and a total."""
        # Imported here because the module draws too, and matplotlib takes half a second to load.
        from hunyuan_train.data.table import bucket_rows, table_text

        planner = self._planner
        groups = [self._stores[cell.store].index.group_of(cell.first) for cell in planner.cells]
        crop_losses = [group.crop_loss for group in groups]
        rows = bucket_rows(
            planner.cells,
            planner.shares.tolist(),
            planner.costs,
            planner.unit_sizes,
            crop_losses,
        )
        served = [store.describe() for store in self._stores if isinstance(store, ServiceStore)]
        return "\n".join([table_text(rows), *served])

    def service_counts(self) -> dict[str, int]:
        """Return where samples came from that encoder processes make; empty without such."""
        counts: Counter[str] = Counter()
        for store in self._stores:
            if isinstance(store, ServiceStore):
                counts.update(store.counts())
        return dict(counts)

    def end(self) -> None:
        """Hang up on encoder processes, if there are any, and stop reading ahead for good."""
        served = [store for store in self._stores if isinstance(store, ServiceStore)]
        if served:
            self.close()
        for store in served:
            store.close()

    def _start(self) -> StepReader:
        if self._reader is None:
            self._planner.load_state_dict(self._state)
            self._reader = StepReader(
                self._stores, self._planner, self._cfg, self._seed, self._rank, self._world_size
            )
            self._abandoned = weakref.finalize(self, self._reader.stop)
        return self._reader

    def _replace_bad(self, step: LoadedStep) -> None:
        """Agree which samples are bad and load others in their places until none is."""
        number = step.state["step"]
        places = [_Place(unit, place) for unit in step.units for place in range(unit.unit.count)]
        self._drawn += len(places)
        bad = self._agreed(places)
        while bad:
            # All are asked for before the first is waited for.
            for place, request in [(place, self._ask_another(place, number)) for place in bad]:
                if request is not None and not place.loaded.cleared:
                    place.fill(self._start(), request)
            self._check_share()
            bad = self._agreed(places)

    def _agreed(self, places: list["_Place"]) -> list["_Place"]:
        """Return the places whose sample is bad on any rank that shares them, if it counts."""
        mask = torch.tensor([self._error(place) is not None for place in places], dtype=torch.bool)
        if self._agree is not None:
            mask = self._agree(mask)
        bad = [place for place, found in zip(places, mask.tolist(), strict=True) if found]
        return [place for place in bad if not place.loaded.cleared]

    def _error(self, place: "_Place") -> SampleError | None:
        """Return what is wrong with the sample of a place, None if it is good."""
        name = place.row.sample_id
        if name in self._excluded:
            return SampleError(name, Reason.refused, self._excluded[name])
        return place.loaded.bad.get(place.index)

    def _ask_another(self, place: "_Place", step: int) -> Request | None:
        """Note the bad sample of ``place``, and ask for the next row of its cell.

        If all others are excluded, there is none, and the whole unit is cleared: the other ranks
        take no part in this one's choice, and a few samples may be all that a cell has.
        """
        unit, reader = place.loaded.unit, self._start()
        cell = self._planner.cells[unit.cell]
        error = self._error(place) or SampleError(
            place.row.sample_id, Reason.unreadable, _ELSEWHERE
        )
        place.refused |= error.reason is Reason.refused
        row = self._next_row(place) if place.loads < _MAX_ATTEMPTS else None
        if row is not None:
            place.loads += 1
            request = reader.ask(unit, place.index, *row)
            self._bad.add(step, place.row, error, request.row.sample_id)
            return request
        self._bad.add(step, place.row, error, "")
        if not place.refused or place.loads >= _MAX_ATTEMPTS:
            raise ValueError(
                f"bucket {cell.bucket} of {cell.name} has no usable sample: {place.attempts + 1} "
                f"of its {cell.count} were tried for one place and all are bad ({self._bad}); "
                "repair or leave out its data"
            )
        place.loaded.cleared = True
        place.loaded.batch.clear()
        return None

    def _next_row(self, place: "_Place") -> tuple[int, int] | None:
        """Return the next row of the cell that is not excluded, with its epoch; None: no more."""
        unit = place.loaded.unit
        cell = self._planner.cells[unit.cell]
        index = self._stores[cell.store].index
        while place.attempts < cell.count - 1:
            with self._start().lock:
                number, epoch = self._planner.replacement(unit, place.index, place.attempts)
            place.attempts += 1
            if index.row(number).sample_id not in self._excluded:
                return number, epoch
            place.refused = True
        return None

    def _check_share(self) -> None:
        limit, unusable = self._cfg.max_bad_share, self._bad.unusable
        if self._drawn >= _MIN_SAMPLES and unusable > limit * self._drawn:
            raise ValueError(
                f"{unusable} of {self._drawn} samples were unusable ({self._bad}), more than "
                f"data.max_bad_share={limit:g}; repair the data or raise data.max_bad_share"
            )


@dataclass(eq=False, slots=True)
class _Place:
    """One sample of an update, and what was tried there."""

    loaded: LoadedUnit
    index: int
    attempts: int = 0
    """Replacements looked at so far."""
    loads: int = 0
    """Those of them that were loaded."""
    refused: bool = False
    """Whether an excluded sample was among what was looked at."""

    @property
    def row(self) -> SampleRow:
        """The sample that is here now."""
        return self.loaded.requests[self.index].row

    def fill(self, reader: StepReader, request: Request) -> None:
        """Put another sample here."""
        self.loaded.requests[self.index] = request
        self.loaded.bad.pop(self.index, None)
        self.loaded.bad.update(reader.fill(self.loaded.unit, self.loaded.batch, [request]))


class _BadSamples:
    """Counts bad samples by reason, and lists each once in a JSONL file."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._reasons: Counter[str] = Counter()
        self._listed: set[str] = set()
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with suppress(ValueError, KeyError):  # a line that a killed run left unfinished
                    self._listed.add(json.loads(line)["sample_id"])

    def __str__(self) -> str:
        """Return the counts by reason, and where the list is."""
        counts = ", ".join(f"{count} {reason}" for reason, count in self._reasons.most_common())
        return f"{counts}; listed in {self._path}" if self._path is not None else counts

    @property
    def total(self) -> int:
        """Bad samples met, repeated ones included."""
        return self._reasons.total()

    @property
    def unusable(self) -> int:
        """Those of them that could not be read, and not only must not be used."""
        return self.total - self._reasons[Reason.refused]

    def add(self, step: int, row: SampleRow, error: SampleError, replaced_by: str) -> None:
        """Count one, and list it if it is new."""
        self._reasons[str(error.reason)] += 1
        if self._path is None or row.sample_id in self._listed:
            return
        self._listed.add(row.sample_id)
        entry = {
            "step": step,
            "sample_id": row.sample_id,
            "bucket": str(row.bucket),
            "reason": str(error.reason),
            "detail": error.detail,
            "replaced_by": replaced_by,
        }
        # One write of one line: ranks with other data may append to the same file.
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")

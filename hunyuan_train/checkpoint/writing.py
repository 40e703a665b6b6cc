"""Writing one checkpoint: prepare, write, commit, delete what retention no longer keeps.

Used by the trainer itself and by its writer process; the ranks that take part are either's.
"""

import errno
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_saver import save

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import first_cause
from hunyuan_train.checkpoint.ranks import Ranks, without_dist_warning
from hunyuan_train.checkpoint.storage import (
    DAMAGED,
    INCOMPLETE,
    REFUSED,
    DamagedCheckpointError,
    FileRecord,
    HashingWriter,
    Manifest,
    fsync_folder,
    list_steps,
    step_folder,
)
from hunyuan_train.checkpoint.tensor_digest import LANES, digest_box, to_hex

log = logging.getLogger(__name__)

# torch.save frames each tensor with about 1.2 KB; the metadata takes the rest.
_BYTES_PER_TENSOR = 2048
_BYTES_PER_CHECKPOINT = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveJob:
    """What to write."""

    step: int
    """Updates done."""
    flat: Mapping[str, Tensor]
    """Tensors by flat name, plain (equal on all ranks) or in parts."""
    extra: dict[str, Any]
    """Plain JSON values."""
    score: float | None
    """Held-out loss, for retention."""


def _size(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


def warn_not_saved(folder: Path, step: int, reason: str, needed: int | None = None) -> None:
    """Say loudly that the checkpoint of ``step`` does not exist, and why."""
    room = ""
    if needed is not None:
        try:
            free = _size(shutil.disk_usage(folder).free)
        except OSError as error:
            free = f"unknown ({error})"
        room = f" It needs {_size(needed)}, free are {free}."
    log.warning(
        "CHECKPOINT OF STEP %d WAS NOT SAVED in %s: %s.%s Training goes on without it; %s.",
        step,
        folder,
        reason,
        room,
        "the next one is tried as usual" if needed is None else "make room before the next one",
    )


class CheckpointWriter:
    """Writes whole checkpoints into one folder; every rank holds one and calls the same."""

    def __init__(
        self, folder: Path, cfg: CheckpointConfig, identity: dict[str, Any], ranks: Ranks
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            folder: Where the ``step-...`` folders go.
            cfg: Retention and digests.
            identity: The model's configuration as plain values.
            ranks: Those that write together.
        """
        self.folder = folder
        self.committed = -1
        """Step of the newest checkpoint this rank renamed; only the first rank does."""
        self._cfg, self._identity, self._ranks = cfg, identity, ranks
        self._scores: dict[int, float | None] = {}

    def write(self, job: SaveJob) -> str:
        """Write a checkpoint and delete old ones; return "" or why the storage did not take it.

        All ranks get the same answer. On a failure the folder is removed and the first rank warns.

        Raises:
            RuntimeError: It failed for another reason than the storage.
        """
        target = step_folder(self.folder, job.step)
        scratch = target.with_name(target.name + INCOMPLETE)
        needed = (
            sum(t.numel() * t.element_size() + _BYTES_PER_TENSOR for t in job.flat.values())
            + _BYTES_PER_CHECKPOINT
        )
        failure = self._first_does(lambda: self._prepare(scratch, needed))
        if failure is None:
            failure = self._write_files(scratch, job)
        if failure is None:
            failure = self._first_does(lambda: self._commit(scratch, target, job.step))
        if failure is not None:
            if self._ranks.is_first:
                shutil.rmtree(scratch, ignore_errors=True)
                warn_not_saved(self.folder, job.step, str(failure), needed)
            return str(failure)
        if self._ranks.is_first:
            log.info("saved checkpoint %s", target)
            self._retain(job)
        return ""

    def _first_does(self, action: Callable[[], None]) -> OSError | None:
        """Run ``action`` on the first rank and return its storage failure on every rank."""
        failure: OSError | None = None
        if self._ranks.is_first:
            try:
                action()
            except OSError as error:
                failure = error
        return self._ranks.from_first(failure)

    def _prepare(self, scratch: Path, needed: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"step-*{INCOMPLETE}"):
            log.warning("removing %s: its save was cut off", leftover)
            shutil.rmtree(leftover)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, "not enough free space, nothing was written")
        scratch.mkdir()

    def _write_files(self, scratch: Path, job: SaveJob) -> OSError | None:
        """Write all files and the manifest; return the storage failure of any rank."""
        writer, planner = HashingWriter(scratch), _Planner()
        raised: CheckpointException | None = None
        try:
            with without_dist_warning():
                save(
                    dict(job.flat),
                    storage_writer=writer,
                    planner=planner,
                    process_group=self._ranks.group,
                    no_dist=not self._ranks.active,
                )
        except CheckpointException as error:  # torch raises it on every rank if one fails.
            raised = error
        own = writer.error
        if raised is not None and own is None:
            own = next((e for e, _ in raised.failures.values() if isinstance(e, OSError)), None)
        reports = self._ranks.gather((own, writer.records))
        failure = next((error for error, _ in reports if error is not None), None)
        if failure is None and raised is not None:
            raise RuntimeError(f"saving {scratch} failed: {first_cause(raised)}") from raised
        if failure is not None:
            return failure
        digests = self._digests(planner, job.flat) if self._cfg.digests else {}
        records: dict[str, FileRecord] = {}
        for _, part in reports:
            records.update(part)
        manifest = Manifest(
            step=job.step,
            identity=self._identity,
            extra=job.extra,
            files=dict(sorted(records.items())),
            world_size=self._ranks.world_size,
            digests=digests,
            score=job.score,
        )
        return self._first_does(lambda: manifest.write(scratch))

    def _digests(self, planner: "_Planner", flat: Mapping[str, Tensor]) -> dict[str, str]:
        """Digest what this rank has written and add it up: each part of a tensor counts once."""
        names = sorted(flat)
        place = {name: i for i, name in enumerate(names)}
        sums = torch.zeros(len(names), LANES, dtype=torch.int64)
        for name, offset, box in planner.written():
            sums[place[name]] += digest_box(box, offset).cpu()
        self._ranks.sum(sums)
        return {name: to_hex(row) for name, row in zip(names, sums, strict=True)}

    def _commit(self, scratch: Path, target: Path, step: int) -> None:
        fsync_folder(scratch)
        replaced = target.with_name(target.name + DAMAGED)
        if target.is_dir():
            # A damaged one that could not be renamed, or a run that was told to start over.
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        scratch.rename(target)
        self.committed = step
        fsync_folder(self.folder)
        for old in (DAMAGED, REFUSED):
            shutil.rmtree(target.with_name(target.name + old), ignore_errors=True)

    def _retain(self, job: SaveJob) -> None:
        self._scores[job.step] = job.score
        steps = [step for step in list_steps(self.folder) if step <= job.step]
        scores = {step: self._score(step) for step in steps} if self._cfg.keep_best else {}
        for old in set(steps) - kept_steps(steps, scores, self._cfg):
            try:
                shutil.rmtree(step_folder(self.folder, old))
            except OSError as error:
                log.warning("cannot delete the old checkpoint of step %d: %s", old, error)

    def _score(self, step: int) -> float | None:
        if step not in self._scores:
            try:
                self._scores[step] = Manifest.read(step_folder(self.folder, step)).score
            except (DamagedCheckpointError, OSError, ValueError):
                self._scores[step] = None  # Restore will say so; it is not among the best.
        return self._scores[step]


def kept_steps(
    steps: list[int], scores: Mapping[int, float | None], cfg: CheckpointConfig
) -> set[int]:
    """Return which of ``steps`` (oldest first) retention keeps."""
    if cfg.keep_last == 0:
        return set(steps)
    kept = set(steps[-cfg.keep_last :])
    if cfg.keep_every:
        kept.update(step for step in steps if step % cfg.keep_every == 0)
    scored = [(score, step) for step, score in scores.items() if score is not None]
    kept.update(step for _, step in sorted(scored)[: cfg.keep_best])
    return kept


class _Planner(DefaultSavePlanner):
    """torch's planner, which remembers what this rank was told to write."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._final: SavePlan | None = None

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self._final = super().finish_plan(new_plan)
        return self._final

    def written(self) -> list[tuple[str, tuple[int, ...], Tensor]]:
        """Return (name, offset in the whole, values) of each part this rank has written."""
        assert self._final is not None
        return [
            (item.index.fqn, tuple(item.tensor_data.chunk.offsets), self.resolve_data(item))
            for item in self._final.items
            if item.tensor_data is not None
        ]  # pyright: ignore[reportReturnType]

"""Saving and restoring the state of a run: atomic, checked, and the same on any number of ranks."""

import errno
import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import (
    NestedTensors,
    check_identity,
    check_tensors,
    describe,
    first_cause,
    flatten,
    inspect,
    read_tensors,
    stored_tensors,
)
from hunyuan_train.checkpoint.ranks import Ranks, without_dist_warning
from hunyuan_train.checkpoint.storage import (
    DAMAGED,
    INCOMPLETE,
    Damage,
    DamagedCheckpointError,
    FileRecord,
    HashingWriter,
    Manifest,
    fsync_folder,
    list_steps,
    step_folder,
)

log = logging.getLogger(__name__)

# torch.save frames each tensor with about 1.2 KB; the metadata takes the rest.
_BYTES_PER_TENSOR = 2048
_BYTES_PER_CHECKPOINT = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What :meth:`CheckpointManager.restore` found, besides the tensors it filled."""

    step: int
    """Updates done when it was saved."""
    extra: dict[str, Any]
    """The counters given to ``save``."""
    folder: Path
    """The checkpoint."""


def _size(num_bytes: int) -> str:
    if num_bytes < 2**30:
        return f"{num_bytes / 2**20:.1f} MiB"
    return f"{num_bytes / 2**30:.1f} GiB"


class CheckpointManager:
    """Writes and reads the checkpoints of one run; every rank holds one and calls the same methods.

    Without a process group it works alone. The folder has to be the same storage for all ranks.
    """

    def __init__(
        self,
        folder: str | Path,
        cfg: CheckpointConfig,
        identity: dict[str, Any],
        group: dist.ProcessGroup | None = None,
    ) -> None:
        """Prepare; nothing is written yet.

        Args:
            folder: Where the ``step-...`` folders go, usually ``run_dir/checkpoints``.
            cfg: Cadence, retention, checks.
            identity: The model's configuration as plain values, stored with each checkpoint and
                compared on restore.
            group: Group of the ranks that save together, best one with a CPU backend; None is the
                default group.
        """
        self.folder = Path(folder)
        self._cfg = cfg
        # Through JSON, so that enums and tuples compare equal to what is read back.
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._ranks = Ranks(group)
        self._last_saved = -1

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step`` updates."""
        return self._cfg.every_steps > 0 and step > 0 and step % self._cfg.every_steps == 0

    def saved(self) -> list[Path]:
        """Return the committed checkpoints, oldest first; their content is not checked."""
        return [step_folder(self.folder, step) for step in list_steps(self.folder)]

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose manifest and file sizes are right; not collective."""
        for path in reversed(self.saved()):
            if not inspect(path, Ranks(alone=True), hashes=False)[1]:
                return path
        return None

    def save(self, step: int, tensors: NestedTensors, extra: dict[str, Any]) -> bool:
        """Write a checkpoint and delete those that retention no longer keeps; every rank calls it.

        If the storage fails on any rank (disk full, quota, I/O error) all ranks agree that the
        checkpoint does not exist, its folder is removed, a warning says what is missing, and
        training can go on.

        Args:
            step: Updates done.
            tensors: Nested {section: {name: tensor}}, plain (equal on all ranks) or DTensor.
            extra: Plain JSON values; those of the first rank are stored.

        Returns:
            Whether the checkpoint of ``step`` is on disk.

        Raises:
            ValueError: ``tensors`` holds something else than tensors, or ``extra`` is not JSON.
        """
        if step == self._last_saved and step_folder(self.folder, step).is_dir():
            return True
        flat = flatten(tensors)
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"extra of the checkpoint of step {step} is not JSON: {error}"
            ) from error
        target = step_folder(self.folder, step)
        scratch = target.with_name(target.name + INCOMPLETE)
        needed = (
            sum(t.numel() * t.element_size() + _BYTES_PER_TENSOR for t in flat.values())
            + _BYTES_PER_CHECKPOINT
        )
        failure = self._first_does(lambda: self._prepare(scratch, needed))
        if failure is None:
            failure = self._write(scratch, flat, step, extra)
        if failure is None:
            failure = self._first_does(lambda: self._commit(scratch, target))
        if failure is not None:
            self._report_failure(step, scratch, needed, failure)
            return False
        self._last_saved = step
        if self._ranks.is_first:
            log.info("saved checkpoint %s", target)
            self._retain(step)
        return True

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

    def _write(
        self, scratch: Path, flat: dict[str, Tensor], step: int, extra: dict[str, Any]
    ) -> OSError | None:
        """Write all files and the manifest; return the storage failure of any rank."""
        writer = HashingWriter(scratch)
        raised: CheckpointException | None = None
        try:
            with without_dist_warning():
                save(
                    flat,
                    storage_writer=writer,
                    planner=DefaultSavePlanner(
                        flatten_state_dict=False, flatten_sharded_tensors=False
                    ),
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
        records: dict[str, FileRecord] = {}
        for _, part in reports:
            records.update(part)
        manifest = Manifest(
            step=step,
            identity=self._identity,
            extra=extra,
            files=dict(sorted(records.items())),
            world_size=self._ranks.world_size,
        )
        return self._first_does(lambda: manifest.write(scratch))

    def _commit(self, scratch: Path, target: Path) -> None:
        fsync_folder(scratch)
        replaced = target.with_name(target.name + DAMAGED)
        if target.is_dir():
            # A damaged one that could not be renamed, or a run that was told to start over.
            shutil.rmtree(replaced, ignore_errors=True)
            target.rename(replaced)
        scratch.rename(target)
        fsync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _report_failure(self, step: int, scratch: Path, needed: int, failure: OSError) -> None:
        if not self._ranks.is_first:
            return
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            free = _size(shutil.disk_usage(self.folder).free)
        except OSError as error:
            free = f"unknown ({error})"
        log.warning(
            "CHECKPOINT OF STEP %d WAS NOT SAVED in %s: %s. It needs %s, free are %s. "
            "Training goes on without it; make room before the next one.",
            step,
            self.folder,
            failure,
            _size(needed),
            free,
        )

    def _retain(self, step: int) -> None:
        keep_last, keep_every = self._cfg.keep_last, self._cfg.keep_every
        if keep_last == 0:
            return
        for old in [s for s in list_steps(self.folder) if s <= step][:-keep_last]:
            if keep_every and old % keep_every == 0:
                continue
            try:
                shutil.rmtree(step_folder(self.folder, old))
            except OSError as error:
                log.warning("cannot delete the old checkpoint of step %d: %s", old, error)

    def restore(self, tensors: NestedTensors) -> Restored | None:
        """Fill ``tensors`` in place from the newest good checkpoint; every rank calls it.

        Any number of ranks and any sharding can read any checkpoint. Damaged ones are named, passed
        over, and renamed to ``step-....damaged`` once an older good one is found; they are deleted
        when their step is saved again.

        Args:
            tensors: The same nested names as given to ``save``; values are bitwise those saved.

        Returns:
            Step and counters, or None if the run has no checkpoint yet.

        Raises:
            ValueError: Every checkpoint is damaged; or the newest good one belongs to another
                model; or names, shapes or types of its tensors differ from ``tensors``.
        """
        flat = flatten(tensors)
        damaged: dict[Path, list[Damage]] = {}
        for step in reversed(self._ranks.from_first(list_steps(self.folder))):
            path = step_folder(self.folder, step)
            manifest, damage = inspect(path, self._ranks, hashes=self._cfg.verify_hashes)
            if damage or manifest is None:
                damaged[path] = damage
                if self._ranks.is_first:
                    log.warning("skipping the damaged checkpoint %s: %s", path, describe(damage))
                continue
            check_identity(path, manifest.identity, self._identity)
            check_tensors(path, stored_tensors(path), flat, dtypes=True)
            try:
                read_tensors(path, flat, self._ranks)
            except DamagedCheckpointError as error:
                # Possible without the hashes; what was filled so far is filled again from an older
                # one.
                damaged[path] = [Damage(file=path.name, reason=str(error), certain=False)]
                if self._ranks.is_first:
                    log.warning("skipping a checkpoint: %s", error)
                continue
            self._ranks.gather(None)
            self._set_aside(damaged)
            self._last_saved = step
            return Restored(step=manifest.step, extra=manifest.extra, folder=path)
        if damaged:
            found = "; ".join(f"{path.name}: {describe(d)}" for path, d in damaged.items())
            raise ValueError(f"no checkpoint in {self.folder} is good: {found}")
        return None

    def _set_aside(self, damaged: dict[Path, list[Damage]]) -> None:
        """Rename what is surely damaged, so that it is never taken for the latest again."""
        if not self._ranks.is_first:
            return
        for path, damage in damaged.items():
            if not all(entry.certain for entry in damage):
                continue
            try:
                path.rename(path.with_name(path.name + DAMAGED))
            except OSError as error:
                log.warning("cannot rename the damaged checkpoint %s: %s", path, error)

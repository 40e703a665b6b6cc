"""Saving and restoring the state of a run: atomic, checked, and the same on any number of ranks."""

import json
import logging
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from hunyuan_train.checkpoint.background import BackgroundSaver
from hunyuan_train.checkpoint.cadence import Cadence
from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import (
    NestedTensors,
    check_identity,
    check_tensors,
    describe,
    flatten,
    inspect,
    read_tensors,
    stored_tensors,
)
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.replay import Replay, ReplayToken
from hunyuan_train.checkpoint.storage import (
    DAMAGED,
    REFUSED,
    Damage,
    DamagedCheckpointError,
    list_steps,
    step_folder,
)
from hunyuan_train.checkpoint.verify import check_digests
from hunyuan_train.checkpoint.writer_process import Answer
from hunyuan_train.checkpoint.writing import CheckpointWriter, SaveJob, warn_not_saved

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Restored:
    """What :meth:`CheckpointManager.restore` found, besides the tensors it filled."""

    step: int
    """Updates done when it was saved."""
    extra: dict[str, Any]
    """The counters given to ``save``."""
    folder: Path
    """The checkpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SaveOutcome:
    """What came of one ``save``."""

    step: int
    failure: str
    """Why there is no such checkpoint; "" if it is on disk."""
    stall_s: float
    """Seconds training stood still for it, waiting for the one before included."""
    seconds: float
    """From the call until the outcome was known."""


class CheckpointManager:
    """Writes and reads the checkpoints of one run; every rank holds one and calls the same methods.

    Without a process group it works alone. The folder has to be the same storage for all ranks.
    After :meth:`start`, :meth:`save` only copies the state and a process beside each rank writes
    it; ask :meth:`poll` once a step, and :meth:`finish` before the run ends.
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
        self._writer = CheckpointWriter(self.folder, cfg, self._identity, self._ranks)
        self._background: BackgroundSaver | None = None
        self._cadence = Cadence(cfg, self._ranks)
        self._replay = Replay(self.folder, cfg, self._ranks)
        self._last_saved = -1
        self._begun: tuple[float, float] = (0.0, 0.0)
        self._outcomes: list[SaveOutcome] = []

    def start(self, tensors: NestedTensors | None = None) -> None:
        """Start the writer process ahead of the first save; every rank calls it.

        It returns at once. Without it, or with ``asynchronous=false``, saving waits for the disk.

        Args:
            tensors: What will be saved, so that memory for the copy is made ready meanwhile.

        Raises:
            ValueError: The writer processes of the ranks could not meet.
        """
        if not self._cfg.asynchronous or self._background is not None:
            return
        self._background = BackgroundSaver(self.folder, self._cfg, self._identity, self._ranks)
        if tensors is not None:
            self._background.reserve(flatten(tensors))

    @property
    def writer_pid(self) -> int | None:
        """The writer process of this rank, None before :meth:`start`."""
        return self._background.pid if self._background else None

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after ``step`` updates; every rank asks each step."""
        return self._cadence.due(step)

    def saved(self) -> list[Path]:
        """Return the committed checkpoints, oldest first; their content is not checked."""
        return [step_folder(self.folder, step) for step in list_steps(self.folder)]

    def latest(self) -> Path | None:
        """Return the newest checkpoint whose manifest and file sizes are right; not collective."""
        for path in reversed(self.saved()):
            if not inspect(path, Ranks(alone=True), hashes=False)[1]:
                return path
        return None

    def save(
        self,
        step: int,
        tensors: NestedTensors,
        extra: dict[str, Any],
        *,
        score: float | None = None,
    ) -> bool:
        """Write a checkpoint and delete those that retention no longer keeps; every rank calls it.

        After :meth:`start` it returns once the state is copied; if the one before is still being
        written, it waits for that first. If the storage fails on any rank (disk full, quota, I/O
        error), or a writer process dies, all ranks agree that the checkpoint does not exist, a
        warning says why, and training can go on.

        Args:
            step: Updates done.
            tensors: Nested {section: {name: tensor}}, plain (equal on all ranks) or DTensor.
            extra: Plain JSON values; those of the first rank are stored.
            score: Held-out loss, for ``keep_best``; lower is better.

        Returns:
            Whether the checkpoint of ``step`` is on disk or on its way there.

        Raises:
            ValueError: ``tensors`` holds something else than tensors, or ``extra`` is not JSON.
        """
        started = time.perf_counter()
        flat = flatten(tensors)
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"extra of the checkpoint of step {step} is not JSON: {error}"
            ) from error
        self._settle(wait=True)
        there = step == self._last_saved and step_folder(self.folder, step).is_dir()
        if self._ranks.from_first(there):
            return True
        if score is not None and not math.isfinite(score):
            score = None
        job = SaveJob(step=step, flat=flat, extra=extra, score=score)
        self._cadence.saved()
        self._replay.begun(step)
        if self._background is not None and self._background.begin(job):
            self._begun = (started, time.perf_counter() - started)
            return True
        failure = self._writer.write(job)
        self._begun = (started, time.perf_counter() - started)
        self._end(step, failure)
        return not failure

    def poll(self) -> list[SaveOutcome]:
        """Return what has become of earlier saves since the last call; never waits."""
        self._settle(wait=False)
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def finish(self) -> list[SaveOutcome]:
        """Wait until nothing is being written and return what :meth:`poll` would."""
        self._settle(wait=True)
        return self.poll()

    def close(self, *, abandon: bool = False) -> None:
        """Finish, or with ``abandon`` leave unfinished what is on its way; end the writer."""
        if not abandon:
            self._settle(wait=True)
        if self._background is not None:
            self._background.close()
            self._background = None

    def _settle(self, *, wait: bool) -> None:
        """Take note of the outcome of the checkpoint on its way, if there is one."""
        background = self._background
        if background is None or background.step < 0:
            return
        step = background.step
        answer = background.answer(wait=wait)
        if answer is not None:
            self._say(step, answer)
            self._end(step, answer.failure)

    def _say(self, step: int, answer: Answer) -> None:
        for level, message in answer.said:
            log.log(level, "%s", message)
        if answer.usable or not answer.failure:
            return
        # The group of the writers is broken; a storage failure has been reported by the writer.
        if self._ranks.is_first:
            warn_not_saved(self.folder, step, answer.failure)
        else:
            log.warning("the checkpoint of step %d failed here: %s", step, answer.failure)

    def _end(self, step: int, failure: str) -> None:
        if not failure:
            self._last_saved = step
        self._replay.ended(step, saved=not failure)
        started, stall = self._begun
        self._outcomes.append(
            SaveOutcome(
                step=step,
                failure=failure,
                stall_s=stall,
                seconds=time.perf_counter() - started,
            )
        )

    def replay_due(self, step: int) -> bool:
        """Return whether the update that led to ``step`` is to be checked or recorded.

        The caller then makes its token and gives it to :meth:`check_replay` and, with ``step - 1``,
        to :meth:`record_replay`. Every rank gets the same answer.
        """
        return self._replay.due(step)

    def record_replay(self, step: int, token: ReplayToken) -> None:
        """Keep the update after ``step`` beside the checkpoint of ``step``.

        It is written when the checkpoint is there, which may be later, and dropped if none was
        begun or it failed.
        """
        self._replay.record(step, token, saved=step == self._last_saved)

    def check_replay(self, token: ReplayToken) -> None:
        """Compare the first update after a restore with what its checkpoint says it came to.

        Every rank calls it. Without a token in the checkpoint, and after the first call, nothing
        is compared.

        Raises:
            ValueError: Samples, loss or gradient norm differ; the message names both values.
        """
        self._replay.check(token)

    def restore(self, tensors: NestedTensors, *, replay: bool = True) -> Restored | None:
        """Fill ``tensors`` in place from the newest good checkpoint; every rank calls it.

        Any number of ranks and any sharding can read any checkpoint. Damaged ones are named, passed
        over, and renamed to ``step-....damaged`` once an older good one is found; they are deleted
        when their step is saved again.

        Args:
            tensors: The same nested names as given to ``save``; values are bitwise those saved.
            replay: Expect the next update to be the one that followed the save; not so if samples
                have been taken out since.

        Returns:
            Step and counters, or None if the run has no checkpoint yet.

        Raises:
            ValueError: Every checkpoint is damaged; or the newest good one belongs to another
                model; or names, shapes or types of its tensors differ from ``tensors``; or a tensor
                does not have the digest it was saved with, on some rank.
        """
        self._settle(wait=True)
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
            if self._cfg.digests:
                check_digests(path, flat, manifest.digests, self._ranks)
            self._set_aside(damaged)
            self._last_saved = step
            self._replay.expect(step, wanted=replay)
            return Restored(step=manifest.step, extra=manifest.extra, folder=path)
        if damaged:
            found = "; ".join(f"{path.name}: {describe(d)}" for path, d in damaged.items())
            raise ValueError(f"no checkpoint in {self.folder} is good: {found}")
        return None

    def go_back(self, step: int) -> None:
        """Prepare to do update ``step`` and all after it once more; every rank calls it.

        Waits for the checkpoint on its way. Those of ``step`` updates or more are renamed to
        ``step-....refused``, so that no restart goes on from them; they are deleted when their step
        is saved again. What was to be kept or compared about coming updates is dropped.
        """
        self._settle(wait=True)
        self._cadence.went_back()
        self._replay.expect(step, wanted=False)
        if self._ranks.is_first:
            for later in [found for found in list_steps(self.folder) if found >= step]:
                path = step_folder(self.folder, later)
                aside = path.with_name(path.name + REFUSED)
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
        self._ranks.gather(None)

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

"""Saving while training goes on: stage the state, hand it to the writer process, ask later."""

import logging
from pathlib import Path
from typing import Any

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.load import FlatTensors
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.staging import SharedMemory, plan
from hunyuan_train.checkpoint.writer import WriterProcess, start_writer
from hunyuan_train.checkpoint.writer_process import Answer, Order
from hunyuan_train.checkpoint.writing import SaveJob

log = logging.getLogger(__name__)


class BackgroundSaver:
    """This rank's memory and writer process, with at most one checkpoint on its way."""

    def __init__(
        self, folder: Path, cfg: CheckpointConfig, identity: dict[str, Any], ranks: Ranks
    ) -> None:
        """Start the writer, without waiting for it; every rank calls it.

        Raises:
            ValueError: The writers could not meet.
        """
        self._what = (folder, cfg, identity, ranks)
        self._ranks = ranks
        self._memory = SharedMemory()
        self._waiting: Order | None = None
        self.step = -1
        """Step on its way; -1 if none is."""
        self._usable = True
        self._writer: WriterProcess = start_writer(*self._what, self._memory)

    @property
    def pid(self) -> int:
        """The writer process."""
        return self._writer.process.pid

    def reserve(self, flat: FlatTensors) -> None:
        """Begin to make room for ``flat``, without waiting for it."""
        _, live, size = plan(flat)
        try:
            self._memory.grow(size, cuda=any(part.is_cuda for part in live), wait=False)
        except OSError as error:
            log.warning("%s", error)

    def begin(self, job: SaveJob) -> bool:
        """Copy the state and have it written; every rank calls it, when nothing is on its way.

        Returns:
            False if a rank has no memory for the copy: then nothing has begun.
        """
        assert self.step < 0
        places, live, size = plan(job.flat)
        problem = ""
        try:
            self._memory.grow(size, cuda=any(part.is_cuda for part in live))
        except OSError as error:
            problem = str(error)
        broken = not self._usable or not self._writer.alive()
        answers = self._ranks.gather((problem, broken))
        if problem := next((problem for problem, _ in answers if problem), ""):
            if self._ranks.is_first:
                log.warning("the checkpoint is written while training waits: %s", problem)
            return False
        if any(broken for _, broken in answers):
            # One that is gone leaves the group of all others unusable.
            self._writer.close()
            self._writer = start_writer(*self._what, self._memory)
            self._usable = True
        self._memory.copy(places, live)
        self._waiting = Order(step=job.step, places=places, extra=job.extra, score=job.score)
        self.step = job.step
        self._hand_over(wait=False)
        return True

    def answer(self, *, wait: bool) -> Answer | None:
        """Return what came of the checkpoint on its way, None if it is not known yet."""
        if self.step < 0 or not self._hand_over(wait=wait):
            return None
        answer = self._writer.answer(wait=wait)
        if answer is not None:
            self._usable, self.step = answer.usable, -1
        return answer

    def _hand_over(self, *, wait: bool) -> bool:
        """Give the order to the writer once all copies are done; return whether it has it."""
        if self._waiting is not None:
            if not self._memory.copied(wait=wait):
                return False
            self._writer.order(self._waiting)
            self._waiting = None
        return True

    def close(self) -> None:
        """End the writer and give the memory back; what is on its way is lost."""
        self._writer.close()
        self._memory.close()

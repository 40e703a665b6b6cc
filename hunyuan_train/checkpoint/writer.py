"""The trainer's side of its writer process."""

import os
import select
import signal
import subprocess
import sys
import uuid
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.staging import SharedMemory, send_large
from hunyuan_train.checkpoint.writer_process import Answer, Order, Setup
from hunyuan_train.runtime.env import child_environment

_END_S = 5.0
# Not with -m: its classes would be those of another module.
_MAIN = "from hunyuan_train.checkpoint.writer_process import main; main()"


class WriterProcess:
    """One writer process; starting it does not wait for its interpreter."""

    def __init__(self, setup: Setup, memory: SharedMemory) -> None:
        """Start the process.

        Args:
            setup: What it has to know.
            memory: Where the tensors will be.
        """
        self._pipe, theirs = Pipe()
        self._message = os.memfd_create("order", os.MFD_CLOEXEC)
        descriptors = (theirs.fileno(), self._message, memory.descriptor)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", _MAIN),
                *(str(number) for number in (os.getpid(), *descriptors)),
            ],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            env=child_environment(
                PYTHONPATH=os.pathsep.join(path for path in sys.path if path),
                OMP_NUM_THREADS="1",
                CUDA_VISIBLE_DEVICES="",  # No context there.
            ),
        )
        theirs.close()
        # Asked once a step: a tenth of the time that Connection.poll takes.
        self._ready = select.poll()
        self._ready.register(self._pipe.fileno(), select.POLLIN)
        self._pipe.send(setup)
        self._rank = setup.rank

    def alive(self) -> bool:
        """Return whether the process still runs; ask when no answer is due."""
        return self.process.poll() is None and not self._ready.poll(0)

    def order(self, order: Order) -> None:
        """Have a checkpoint written; the tensors are in the memory already."""
        size = send_large(self._message, order)
        with suppress(OSError):  # It is dead; ``answer`` says so.
            self._pipe.send(size)

    def answer(self, *, wait: bool) -> Answer | None:
        """Return what came of the last order, None if it is not done yet."""
        try:
            if not wait and not self._ready.poll(0):
                return None
            return cast(Answer, self._pipe.recv())
        except (EOFError, OSError):
            return Answer(failure=self._obituary(), usable=False, said=[])

    def _obituary(self) -> str:
        try:
            code = self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            return f"the writer process of rank {self._rank} no longer answers"
        how = (
            f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        return f"the writer process of rank {self._rank} {how}"

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        os.close(self._message)
        try:
            # It ends by itself, unless it is in the middle of something nobody waits for.
            self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start_writer(
    folder: Path,
    cfg: CheckpointConfig,
    identity: dict[str, Any],
    ranks: Ranks,
    memory: SharedMemory,
) -> WriterProcess:
    """Start this rank's writer; every rank calls it.

    Raises:
        ValueError: The trainers met in a way that other processes cannot.
    """
    setup = Setup(
        rank=ranks.rank,
        world_size=ranks.world_size,
        meeting=meeting_place(ranks),
        nonce=ranks.from_first(uuid.uuid4().hex),
        folder=folder.absolute(),
        cfg=cfg,
        identity=identity,
    )
    return WriterProcess(setup, memory)


def meeting_place(ranks: Ranks) -> tuple[str, str, int]:
    """Return where the writers can meet: the store in which the trainers have met.

    Raises:
        ValueError: That store is in the memory of one process.
    """
    if ranks.world_size == 1:
        return "", "", 0
    store: Any = dist.distributed_c10d._get_default_store()
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if isinstance(store, dist.TCPStore):
        return "tcp", store.host, store.port
    if isinstance(store, dist.FileStore):
        return "file", cast(Any, store).path, 0
    raise ValueError(
        f"checkpoint.asynchronous=true needs a TCP or file store between the ranks, not a "
        f"{type(store).__name__}; set checkpoint.asynchronous=false"
    )

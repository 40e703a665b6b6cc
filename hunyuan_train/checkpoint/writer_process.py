"""The process beside each rank that writes its checkpoints.

It gets a :class:`Setup`, joins a gloo group of its own with the writers of the other ranks, and
then writes one job after the other. The tensors lie in memory it shares with its trainer. It has no
accelerator, steps back for the trainer where cores are short, and ends when its trainer is gone.
"""

import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.staging import StagedTensor, open_tensors, receive_large
from hunyuan_train.checkpoint.writing import CheckpointWriter, SaveJob

START_S = 300.0
"""How long the writers wait for each other to start."""
WRITE_S = 3600.0
"""How long a writer waits for the others while writing."""
_NICENESS = 5
_WATCH_S = 0.2
_IGNORED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
"""Signals that schedulers and terminals send to whole process groups: the trainer decides."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """What a writer has to know once."""

    rank: int
    world_size: int
    meeting: tuple[str, str, int]
    """("tcp", host, port) or ("file", path, 0) of the trainers' store; ("", "", 0) if alone."""
    nonce: str
    """Sets this group of writers apart from every other."""
    folder: Path
    cfg: CheckpointConfig
    identity: dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """One checkpoint to write."""

    step: int
    places: dict[str, StagedTensor]
    extra: dict[str, Any]
    score: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What came of an order."""

    failure: str
    """"" if the checkpoint is on disk."""
    usable: bool
    """Whether this process can take another order."""
    said: list[tuple[int, str]]
    """(level, message) of what was logged meanwhile, for the trainer's log."""


class _Notes(logging.Handler):
    """Keeps messages until they are taken."""

    def __init__(self) -> None:
        super().__init__()
        self._said: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._said.append((record.levelno, record.getMessage()))

    def take(self) -> list[tuple[int, str]]:
        said, self._said = self._said, []
        return said


def main() -> None:
    """Serve the trainer; arguments are the descriptors of the pipe, the message and the tensors."""
    for name in _IGNORED:
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    trainer = int(sys.argv[1])
    threading.Thread(target=_end_with, args=(trainer,), daemon=True).start()
    os.nice(_NICENESS)
    torch.set_num_threads(1)
    pipe, message, tensors = Connection(int(sys.argv[2])), int(sys.argv[3]), int(sys.argv[4])
    notes = _Notes()
    logger = logging.getLogger("hunyuan_train")
    logger.addHandler(notes)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # The trainer closed its end.
        _serve(pipe, message, tensors, notes)
    # Threads of gloo may still wait for others; there is nothing to clean up.
    os._exit(0)


def _serve(pipe: Connection, message: int, tensors: int, notes: _Notes) -> None:
    setup: Setup = pipe.recv()
    writer, failure = None, ""
    try:
        writer = _join(setup)
    except Exception as error:
        failure = f"the writer processes did not find each other: {_one_line(error)}"
    while True:
        order: Order = receive_large(message, pipe.recv())
        usable = writer is not None
        if writer is not None:
            failure, usable = _carry_out(order, writer, tensors)
        pipe.send(Answer(failure=failure, usable=usable, said=notes.take()))


def _join(setup: Setup) -> CheckpointWriter:
    """Form the group of the writers."""
    if setup.world_size > 1:
        kind, place, port = setup.meeting
        store: dist.Store
        if kind == "tcp":
            store = dist.TCPStore(
                place, port, is_master=False, wait_for_workers=False,
                timeout=timedelta(seconds=START_S),
            )  # fmt: skip
        else:
            store = dist.FileStore(place, -1)
        store = dist.PrefixStore(f"checkpoint-writers/{setup.nonce}", store)
        store.set(f"here/{setup.rank}", "")
        here = [f"here/{rank}" for rank in range(setup.world_size)]
        store.wait(here, timedelta(seconds=START_S))
        dist.init_process_group(
            "gloo", store=store, rank=setup.rank, world_size=setup.world_size,
            timeout=timedelta(seconds=WRITE_S),
        )  # fmt: skip
    return CheckpointWriter(setup.folder, setup.cfg, setup.identity, Ranks())


def _carry_out(order: Order, writer: CheckpointWriter, tensors: int) -> tuple[str, bool]:
    """Write one checkpoint; return why it failed, if so, and whether the group still works."""
    try:
        job = SaveJob(
            step=order.step,
            flat=open_tensors(tensors, order.places),
            extra=order.extra,
            score=order.score,
        )
        return writer.write(job), True
    except Exception as error:
        # Whatever it is, the run goes on: a writer of another rank that died shows up here too.
        failure = "" if writer.committed == order.step else _one_line(error)
        return failure, False


def _one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _end_with(trainer: int) -> None:
    """End this process at once when its trainer is gone, whatever it is doing."""
    while os.getppid() == trainer:
        time.sleep(_WATCH_S)
    os._exit(1)

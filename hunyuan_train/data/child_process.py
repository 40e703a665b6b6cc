"""One decoding process as its parent sees it, and what runs in it.

Nothing here may import torch: every decoding process would take seconds and 200 MB for it.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from hunyuan_train.data.quarantine import MediaError, Reason, SampleError

_POLL_S = 0.2
_END_S = 5.0
_START_S = 120.0
"""How long a process may take to import what it runs, on a machine that is busy."""
_PROCESSES = threading.Lock()
"""Guards starting and reaping: the exit code of a forkserver's child can be read only once."""


def decoding_processes() -> list[int]:
    """Return the process ids of those that live; for drills, which end one."""
    with _PROCESSES:
        return sorted(child.pid for child in multiprocessing.active_children() if child.pid)


class Lost(Exception):
    """The process died or took too long."""


class Closed(Exception):
    """The workers are being closed."""


def as_sample_error(name: str, error: Exception) -> SampleError:
    """Turn whatever reading or decoding raised into the reason why a sample is bad."""
    if isinstance(error, SampleError):
        return error
    if isinstance(error, MediaError):
        return SampleError(name, error.reason, error.detail)
    return SampleError(name, Reason.unreadable, f"{type(error).__name__}: {error}")


class Child:
    """One decoding process and the pipe to it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_child_main, args=(theirs, function), daemon=True)
        with _PROCESSES:
            self.process.start()
        theirs.close()

    def alive(self) -> bool:
        with _PROCESSES:
            return self.process.is_alive()

    def wait_until_ready(self, closed: Callable[[], bool]) -> None:
        """Wait for the imports of the process, which are no part of a job's time."""
        try:
            self._wait(_START_S, closed)
            self.connection.recv()
        except (Lost, EOFError, OSError) as error:
            self.end()
            raise RuntimeError(
                f"a data worker process (pid {self.process.pid}) does not start: "
                f"{error or self.exit()}; what it printed is above"
            ) from error

    def call(
        self, arguments: tuple[Any, ...], timeout_s: float, closed: Callable[[], bool]
    ) -> tuple[Any, tuple[Reason, str] | None]:
        """Return what the function returned, or reason and detail of what it raised."""
        try:
            self.connection.send(arguments)
            self._wait(timeout_s, closed)
            return _receive(self.connection)
        except (EOFError, OSError) as error:
            raise Lost(self.exit()) from error

    def end(self) -> None:
        """Kill the process, which has nothing to save, and wait for it."""
        self.connection.close()
        with _PROCESSES:
            self.process.kill()
            self.process.join(_END_S)

    def _wait(self, timeout_s: float, closed: Callable[[], bool]) -> None:
        until = time.monotonic() + timeout_s
        while True:
            left = until - time.monotonic()
            ready = wait([self.connection, self.process.sentinel], max(0.0, min(_POLL_S, left)))
            if self.connection in ready:
                return
            if ready:
                raise Lost(self.exit())
            if closed():
                raise Closed
            if left <= 0:
                raise Lost(f"took more than {timeout_s:g} s")

    def exit(self) -> str:
        """Say how the process ended, once it has."""
        with _PROCESSES:
            self.process.join(_END_S)
            code = self.process.exitcode
        if code is not None and code < 0:
            with suppress(ValueError):
                return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"


def _child_main(connection: Connection, function: Callable[..., Any]) -> None:
    """Answer calls until the other end is closed; the whole life of a decoding process."""
    # Ctrl-C and what a scheduler sends reach all processes of a job; the parent decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):
        connection.send(None)
        while True:
            _send(connection, _answer(function, connection.recv()))


def _end_with_parent() -> None:
    """End this process, even inside a call that hangs, when the parent is gone."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments), None
    except Exception as raised:
        # As plain values: not every exception survives pickling.
        error = as_sample_error("", raised)
        return None, (error.reason, error.detail)


def _send(connection: Connection, answer: Any) -> None:
    buffers: list[pickle.PickleBuffer] = []
    try:
        head = pickle.dumps(answer, 5, buffer_callback=buffers.append)
    except Exception as error:
        buffers.clear()
        head = pickle.dumps((None, (Reason.unreadable, f"its result cannot be sent: {error}")))
    views = [buffer.raw() for buffer in buffers]
    connection.send((head, [view.nbytes for view in views]))
    for view in views:
        while view:
            view = view[os.write(connection.fileno(), view) :]


def _receive(connection: Any) -> Any:
    """Return an answer; its arrays are read into their own memory, without the copy in between.

    Raises:
        EOFError: The other end is gone.
    """
    head, sizes = connection.recv()
    buffers: list[np.ndarray] = []
    for size in sizes:
        buffer = np.empty(size, np.uint8)
        view = buffer.data
        while view:
            received = os.readv(connection.fileno(), [view])
            if not received:
                raise EOFError
            view = view[received:]
        buffers.append(buffer)
    return pickle.loads(head, buffers=buffers)

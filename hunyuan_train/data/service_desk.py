"""The desk of an encoder process: who asks it for what, and the answers."""

import logging
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hunyuan_train.data.fetch import Request
from hunyuan_train.data.index import Index
from hunyuan_train.data.service_board import LOCAL, Board, Entry
from hunyuan_train.data.service_greeting import Welcome, greet
from hunyuan_train.data.wire import Garbled, Line

logger = logging.getLogger(__name__)

_ALIVE_S = 1.0


@dataclass(eq=False, slots=True)
class _Client:
    line: Line
    name: str
    waiting: int = 0
    """Requests of it that were not answered."""
    gone: bool = False


@dataclass(eq=False, slots=True)
class Job:
    """A row that somebody waits for."""

    request: Request
    askers: list[tuple[_Client, int]]
    moments: dict[str, Tensor] | None = None
    """Of its latents, if only its text is missing."""
    raw_bytes: int = 0
    """Of its pixels, once they are asked for."""
    key: str | None = None
    """Of its file, before it was decoded."""

    def done(self) -> bool:
        """Whether it can be encoded now."""
        return self.moments is not None or self.request.future.done()

    def wanted(self) -> bool:
        """Whether anybody still waits."""
        return not all(client.gone for client, _ in self.askers)


class Desk:
    """Registers an encoder, takes requests, and sends what becomes of them.

    Args:
        sock: Where clients connect, listening.
        entry: How they find it.
        board: Where it registers.
        index: What row numbers refer to.
        welcome: What clients are told.
        silence_s: Seconds after which a client that takes nothing is dropped.
        failed: Called with what ended a thread of the desk.
    """

    def __init__(
        self,
        sock: socket.socket,
        entry: Entry,
        board: Board,
        index: Index,
        welcome: Welcome,
        silence_s: float,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._socket = sock
        self._entry = entry
        self._board = board
        self._index = index
        self._welcome = welcome
        self._silence_s = silence_s
        self._failed = failed
        self.changed = threading.Condition()
        """Notified when a job comes; its lock guards all jobs."""
        self.fresh: deque[Job] = deque()
        """Jobs that nobody has begun."""
        self.most_waiting = 0
        """The most jobs that were open at a time."""
        self._clients: set[_Client] = set()
        self._jobs: dict[tuple[int, int], Job] = {}
        self._closed = False
        self._path = board.post(entry)

    def open(self) -> None:
        """Begin to take clients."""
        for target in (self._accept, self._live):
            threading.Thread(target=self._guarded, args=(target,), daemon=True).start()

    def close(self) -> None:
        """Take the entry away and hang up."""
        with self.changed:
            self._closed = True
            clients, self._clients = self._clients, set()
        with suppress(OSError):
            self._path.unlink()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for client in clients:
            client.line.close()

    def answer(
        self, job: Job, header: dict[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        """Take a job off the books and send its answer to all who asked."""
        for client, asked in self.forget(job):
            self._send(client, {**header, "id": asked}, tensors)

    def forget(self, job: Job) -> list[tuple[_Client, int]]:
        """Take a job off the books and return who asked."""
        with self.changed:
            self._jobs.pop((job.request.number, job.request.variant), None)
            for client, _ in job.askers:
                client.waiting -= 1
            return job.askers

    def _guarded(self, target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            if not self._closed:
                self._failed(error)

    def _accept(self) -> None:
        while not self._closed:
            sock, address = self._socket.accept()
            client = _Client(Line(sock, self._silence_s), f"{address[0]}:{address[1]}")
            threading.Thread(target=self._listen, args=(client,), daemon=True).start()

    def _live(self) -> None:
        """Show every second that this process lives."""
        while not self._closed:
            try:
                os.utime(self._path)
            except FileNotFoundError:
                self._path = self._board.post(self._entry)
            with self.changed:
                clients = list(self._clients)
            for client in clients:
                try:
                    client.line.remark({"op": "alive"})
                except (OSError, ValueError):  # gone, or hung up on by us
                    self._drop(client)
            time.sleep(_ALIVE_S)

    def _listen(self, client: _Client) -> None:
        try:
            if not greet(client.line, self._entry, self._index.folder.name, self._welcome):
                return
            with self.changed:
                self._clients.add(client)
            while True:
                client.line.wait()
                header, _ = client.line.receive()
                number, variant, asked = (int(header[k]) for k in ("number", "variant", "id"))
                self._ask(client, number, variant, asked)
        except OSError:
            pass  # it hung up
        except (ValueError, Garbled, KeyError, TypeError, IndexError) as error:
            if not client.gone:
                logger.warning("%s is no client of ours (%r); hung up", client.name, error)
        finally:
            self._drop(client)

    def _ask(self, client: _Client, number: int, variant: int, asked: int) -> None:
        row = self._index.row(number)
        if not 0 <= variant < len(row.texts):
            raise IndexError(f"caption {variant} of {row.sample_id}")
        with self.changed:
            client.waiting += 1
            if client.waiting > self._welcome.window:
                raise Garbled(f"it asks for more than {self._welcome.window} samples at a time")
            known = self._jobs.get((number, variant))
            if known is not None:
                known.askers.append((client, asked))
                return
            future: Future[Any] = Future()
            request = Request(
                place=0, number=number, row=row, epoch=0, variant=variant, future=future
            )
            job = Job(request, [(client, asked)])
            self._jobs[number, variant] = job
            self.fresh.append(job)
            self.most_waiting = max(self.most_waiting, len(self._jobs))
            self.changed.notify_all()

    def _drop(self, client: _Client) -> None:
        with self.changed:
            client.gone = True
            self._clients.discard(client)
        client.line.close()

    def _send(
        self, client: _Client, header: dict[str, Any], tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        try:
            client.line.send(header, tensors)
        except OSError:
            self._drop(client)


def listening_socket(host: str) -> socket.socket:
    """Return a socket that takes connections of this machine alone (LOCAL) or of all."""
    return socket.create_server((LOCAL if host == LOCAL else "", 0), backlog=64)

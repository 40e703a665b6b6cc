"""Snapshots on other nodes: every rank keeps copies for another one and hands parts out.

Plain sockets of their own, so that nothing here can get into the way of the training collectives,
and a peer that hangs costs no more than the snapshot. Free of torch.
"""

import hmac
import json
import logging
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hunyuan_train.resilience.slots import (
    Part,
    SlotPair,
    Stamp,
    digest_payload,
    read_payload,
    stored_parts,
)

_LENGTH = struct.Struct("<I")
_LONGEST = 1 << 16
_PIECE = 1 << 20

Address = tuple[str, int]
log = logging.getLogger(__name__)


class PeerServer:
    """Keeps copies in this node's folder and hands out the parts that lie there."""

    def __init__(self, folder: Path, host: str, token: str, timeout_s: float) -> None:
        """Listen on a free port of ``host`` and answer on threads of its own.

        Args:
            folder: Of this node.
            host: Address of this machine that the others reach.
            token: What a caller has to know.
            timeout_s: Longest wait for the next bytes of a message.
        """
        self._folder, self._token, self._timeout_s = folder, token, timeout_s
        self._listening = socket.create_server((host, 0), backlog=64)
        self.address: Address = self._listening.getsockname()[:2]
        self._pairs: dict[int, SlotPair] = {}
        self._locks: dict[int, threading.Lock] = {}
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, name="snapshot-server", daemon=True).start()

    def close(self) -> None:
        """Stop listening and drop all connections."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return  # closed
            threading.Thread(
                target=self._serve, args=(connection,), name="snapshot-copy", daemon=True
            ).start()

    def _serve(self, connection: socket.socket) -> None:
        """Answer one caller until it leaves."""
        with self._lock:
            self._open.add(connection)
        try:
            connection.settimeout(self._timeout_s)
            token = str(receive_message(connection).get("token"))
            if not hmac.compare_digest(token.encode(), self._token.encode()):
                return
            while True:
                connection.settimeout(None)  # the next snapshot may be hours away
                message = receive_message(connection)
                connection.settimeout(self._timeout_s)
                if message["do"] == "store":
                    self._store(connection, message)
                else:
                    self._hand_out(connection, message)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if not isinstance(error, EOFError | ConnectionError):
                log.debug("a caller for snapshots was dropped: %s", error)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()

    def _store(self, connection: socket.socket, message: dict[str, Any]) -> None:
        part = Part(**message["part"])
        keep = message["keep"]
        with self._lock:
            pair = self._pairs.setdefault(part.rank, SlotPair(self._folder, part.rank, copy=True))
            lock = self._locks.setdefault(part.rank, threading.Lock())
        with lock:  # an earlier connection of the same rank may not have noticed its end yet
            try:
                slot = pair.free(tuple(keep) if keep else None)
                slot.reserve(part.payload_bytes)
                slot.begin()
            except OSError as error:
                send_message(connection, {"error": str(error)})
                return
            send_message(connection, {"error": ""})
            payload = slot.payload(part.payload_bytes)
            receive_into(connection, payload)
            if digest_payload(payload) != part.digest:
                send_message(connection, {"error": "it arrived damaged"})
                return
            slot.complete(part)
        send_message(connection, {"error": ""})

    def _hand_out(self, connection: socket.socket, message: dict[str, Any]) -> None:
        stamp: Stamp = (message["lineage"], message["step"])
        for path, part in stored_parts(self._folder):
            if part.rank == message["rank"] and part.stamp == stamp:
                with suppress(OSError):
                    payload = read_payload(path, part)
                    send_message(connection, {"part": asdict(part)})
                    send_pieces(connection, payload)
                    return
        send_message(connection, {"part": None})


class Peer:
    """A connection to the server of another rank, opened when it is needed."""

    def __init__(self, address: Address, token: str, timeout_s: float) -> None:
        """Prepare; see :class:`PeerServer`."""
        self._address, self._token, self._timeout_s = address, token, timeout_s
        self._connection: socket.socket | None = None

    def store(self, part: Part, payload: memoryview, keep: Stamp | None) -> None:
        """Have the peer keep a copy.

        Args:
            part: What ``payload`` is.
            payload: The bytes.
            keep: The snapshot it must not overwrite.

        Raises:
            OSError: It does not answer, has no room, or got something else than was sent.
        """

        def exchange(connection: socket.socket) -> None:
            send_message(connection, {"do": "store", "part": asdict(part), "keep": keep})
            hear_no_problem(connection, part.rank)
            send_pieces(connection, payload)
            hear_no_problem(connection, part.rank)

        self._call(exchange)

    def fetch(self, rank: int, stamp: Stamp) -> tuple[Part, memoryview] | None:
        """Return a part that lies on the peer's node, None if it has none; it is not checked.

        Raises:
            OSError: It does not answer.
        """
        found: list[tuple[Part, memoryview]] = []

        def exchange(connection: socket.socket) -> None:
            message = {"do": "fetch", "rank": rank, "lineage": stamp[0], "step": stamp[1]}
            send_message(connection, message)
            answer = receive_message(connection)["part"]
            if answer is not None:
                part = Part(**answer)
                payload = memoryview(bytearray(part.payload_bytes))
                receive_into(connection, payload)
                found.append((part, payload))

        self._call(exchange)
        return found[0] if found else None

    def _call(self, exchange: Callable[[socket.socket], None]) -> None:
        """Run an exchange on the open connection, or on a new one; a failed one is dropped."""
        try:
            if self._connection is None:
                self._connection = socket.create_connection(self._address, self._timeout_s)
                self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                send_message(self._connection, {"token": self._token})
            exchange(self._connection)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Drop the connection; a thread that is using it gets an ``OSError``."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def send_message(connection: socket.socket, message: dict[str, Any]) -> None:
    """Send a JSON object after its length."""
    text = json.dumps(message).encode()
    connection.sendall(_LENGTH.pack(len(text)) + text)


def send_pieces(connection: socket.socket, payload: memoryview) -> None:
    """Send bytes; the time limit of the connection counts for each piece, not for all."""
    for begin in range(0, len(payload), _PIECE):
        connection.sendall(payload[begin : begin + _PIECE])


def hear_no_problem(connection: socket.socket, rank: int) -> None:
    """Receive the answer of a server that was asked to store something.

    Raises:
        OSError: It has a problem.
    """
    if problem := receive_message(connection)["error"]:
        raise OSError(f"the node that keeps the copy of rank {rank} says: {problem}")


def receive_message(connection: socket.socket) -> dict[str, Any]:
    """Receive a JSON object.

    Raises:
        OSError: The other side is gone or silent.
        ValueError: It sent something else.
    """
    size = bytearray(_LENGTH.size)
    receive_into(connection, memoryview(size))
    (length,) = _LENGTH.unpack(size)
    if length > _LONGEST:
        raise ValueError(f"a message of {length} bytes")
    text = bytearray(length)
    receive_into(connection, memoryview(text))
    message = json.loads(text)
    if not isinstance(message, dict):
        raise ValueError("a message that is no object")
    return message


def receive_into(connection: socket.socket, target: memoryview) -> None:
    """Fill ``target``.

    Raises:
        OSError: The other side is gone or silent.
    """
    done = 0
    while done < len(target):
        count = connection.recv_into(target[done : done + _PIECE])
        if count == 0:
            raise ConnectionResetError("the other side has closed the connection")
        done += count


def host_towards(other: str) -> str:
    """Return the address of the interface of this machine that leads to ``other``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((other, 9))  # sends nothing; the kernel picks the interface
        return probe.getsockname()[0]

"""Frames: what ranks and encoders send each other, and what a file of the cache holds.

A frame is a magic word, the lengths of header and body and their digest, a JSON header, and the
bytes of tensors one after the other, of which the header has names, dtypes and shapes. One that was
cut short or changed is found out. Nothing is ever unpickled.
"""

import hashlib
import hmac
import json
import math
import secrets
import select
import socket
import struct
import threading
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
import xxhash
from torch import Tensor

_MAGIC = b"HTL1"
_HEAD = struct.Struct("<4sIQQ")
_MOST_HEADER = 2**20
_MOST_BODY = 2**33
"""A clip of 129 x 1280 x 1280 has latents of 100 MB."""
_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}


class Garbled(Exception):
    """Bytes that are no frame, or not the expected one."""


def pack(header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> bytearray:
    """Return the frame of a JSON-able header and tensors on the CPU."""
    items = {name: tensor.contiguous() for name, tensor in (tensors or {}).items()}
    views = [tensor.flatten().view(torch.uint8).numpy().data for tensor in items.values()]
    body = b"".join(views)
    shapes = [[name, str(t.dtype)[6:], list(t.shape)] for name, t in items.items()]
    head = json.dumps({**header, "tensors": shapes}).encode()
    begin = _HEAD.pack(_MAGIC, len(head), len(body), _digest(head, body))
    return bytearray(begin) + head + body


def unpack(frame: bytes | bytearray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return header and tensors of a whole frame.

    Raises:
        Garbled: It is none.
    """
    header_nbytes, body_nbytes, digest = _parse(frame[: _HEAD.size])
    if len(frame) != _HEAD.size + header_nbytes + body_nbytes:
        raise Garbled(f"{len(frame)} bytes where {_HEAD.size + header_nbytes + body_nbytes} belong")
    middle = _HEAD.size + header_nbytes
    return _contents(frame[_HEAD.size : middle], bytearray(memoryview(frame)[middle:]), digest)


def _digest(head: bytes | bytearray, body: bytes | bytearray) -> int:
    both = xxhash.xxh3_64(head)
    both.update(body)
    return both.intdigest()


def _parse(head: bytes | bytearray) -> tuple[int, int, int]:
    """Return lengths of header and body, and their digest."""
    if len(head) < _HEAD.size:
        raise Garbled("it is cut short")
    magic, header_nbytes, body_nbytes, digest = _HEAD.unpack(head)
    if magic != _MAGIC or header_nbytes > _MOST_HEADER or body_nbytes > _MOST_BODY:
        raise Garbled(f"it begins with {bytes(head)!r}")
    return header_nbytes, body_nbytes, digest


def _contents(
    head: bytes | bytearray, body: bytearray, digest: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if digest != _digest(head, body):
        raise Garbled("its digest does not fit")
    try:
        header = json.loads(head)
        shapes = [
            (str(name), _DTYPES[dtype], [int(size) for size in shape])
            for name, dtype, shape in header.pop("tensors")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Garbled(f"its header cannot be read ({error!r})") from error
    tensors: dict[str, Tensor] = {}
    place = 0
    for name, dtype, shape in shapes:
        count = math.prod(shape)
        if min(shape, default=0) < 0 or place + count * dtype.itemsize > len(body):
            raise Garbled(f"{name} does not fit into it")
        flat = (
            torch.frombuffer(body, dtype=dtype, count=count, offset=place)
            if count
            else torch.empty(0, dtype=dtype)
        )
        tensors[name] = flat.view(shape)
        place += count * dtype.itemsize
    if place != len(body):
        raise Garbled(f"{len(body) - place} bytes of it belong to nothing")
    return header, tensors


class Line:
    """One end of a connection; any thread may send, one receives.

    Args:
        sock: The connected socket, owned from here on.
        patience_s: Seconds without progress after which sending, or receiving the rest of a frame,
            fails.
    """

    def __init__(self, sock: socket.socket, patience_s: float) -> None:
        self._socket = sock
        sock.settimeout(patience_s)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._sending = threading.Lock()

    def send(self, header: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Send a frame.

        Raises:
            OSError: The other end is gone or takes nothing.
        """
        frame = pack(header, tensors)
        with self._sending:
            self._socket.sendall(frame)

    def remark(self, header: Mapping[str, Any]) -> None:
        """Send a small frame, but only if that does not have to wait for anything.

        Raises:
            OSError: The other end is gone.
        """
        if not self._sending.acquire(blocking=False):
            return  # something is being sent
        try:
            if self._ready(select.POLLOUT, 0):
                self._socket.sendall(pack(header))
        finally:
            self._sending.release()

    def wait(self) -> None:
        """Wait, however long, until there is something to receive."""
        self._ready(select.POLLIN, None)

    def receive(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Receive a frame.

        Raises:
            OSError: The other end is gone or silent (TimeoutError).
            Garbled: What came is no frame.
        """
        header_nbytes, body_nbytes, digest = _parse(self._read(_HEAD.size))
        return _contents(self._read(header_nbytes), self._read(body_nbytes), digest)

    def close(self) -> None:
        """Hang up; whoever waits in :meth:`receive` or :meth:`wait` gets an error."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _ready(self, event: int, timeout: int | None) -> bool:
        waiter = select.poll()
        waiter.register(self._socket, event)
        return bool(waiter.poll(timeout))

    def _read(self, nbytes: int) -> bytearray:
        data = bytearray(nbytes)
        view = memoryview(data)
        while view:
            received = self._socket.recv_into(view)
            if not received:
                raise ConnectionError("the other end hung up")
            view = view[received:]
        return data


def nonce() -> str:
    """Return a number that was never used before."""
    return secrets.token_hex(16)


def proof(token: str, *parts: str) -> str:
    """Return what only those who know ``token`` can say about ``parts``."""
    return hmac.new(token.encode(), "\0".join(parts).encode(), hashlib.sha256).hexdigest()


def proven(token: str, found: Any, *parts: str) -> bool:
    """Whether ``found`` is the :func:`proof` of ``parts``."""
    return isinstance(found, str) and hmac.compare_digest(found, proof(token, *parts))

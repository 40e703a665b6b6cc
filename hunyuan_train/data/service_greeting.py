"""How an encoder and a rank meet: each proves that it knows the token, and settings are compared.

The encoder begins with a challenge, the rank answers and sends one of its own with what it wants,
and the encoder answers that with what it has. The token itself is never sent.
"""

import socket
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hunyuan_train.data.service_board import Entry
from hunyuan_train.data.wire import Garbled, Line, nonce, proof, proven

_CONNECT_S = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Welcome:
    """What an encoder says of itself."""

    about: dict[str, Any]
    """The fields of a StoreMeta."""
    window: int
    """Requests of one rank that it takes at a time."""
    empty: dict[str, Tensor]
    """Features of the empty caption: ``image/pooled``, ``image/states`` and the same of video."""


def greet(line: Line, entry: Entry, index: str, welcome: Welcome) -> bool:
    """Meet a rank, as the encoder ``entry``; return whether it wants what there is.

    Raises:
        Garbled: It does not know the token.
        OSError: It is gone.
    """
    challenge = nonce()
    line.send({"op": "challenge", "nonce": challenge})
    hello, _ = line.receive()
    if not proven(entry.token, hello.get("proof"), "client", challenge):
        raise Garbled("it does not know the token")
    for name, value in {"settings": entry.settings, "index": index}.items():
        if hello.get(name) != value:
            line.send({"op": "refused", "why": f"{name} {value}"})
            return False
    answer = proof(entry.token, "server", str(hello["nonce"]))
    header = {"op": "welcome", "proof": answer, "about": welcome.about, "window": welcome.window}
    line.send(header, welcome.empty)
    return True


def connect(entry: Entry, settings: str, index: str, patience_s: float) -> tuple[Line, Welcome]:
    """Connect to an encoder, as a rank.

    Raises:
        OSError: It cannot be reached.
        Garbled: It is no encoder that knows the token, or it has other settings or another index.
    """
    line = Line(socket.create_connection((entry.host, entry.port), _CONNECT_S), patience_s)
    try:
        challenge, _ = line.receive()
        ours = nonce()
        answer = proof(entry.token, "client", str(challenge.get("nonce")))
        wanted = {"settings": settings, "index": index}
        line.send({"op": "hello", "proof": answer, "nonce": ours, **wanted})
        found, empty = line.receive()
        if found.get("op") == "refused":
            raise Garbled(f"it serves {found.get('why')}, which is not what this run has")
        if not proven(entry.token, found.get("proof"), "server", ours):
            raise Garbled("it does not know the token")
        try:
            window, about = int(found["window"]), dict(found["about"])
        except (KeyError, TypeError, ValueError) as error:
            raise Garbled(f"its welcome cannot be read ({error!r})") from error
    except BaseException:
        line.close()
        raise
    return line, Welcome(about=about, window=window, empty=empty)

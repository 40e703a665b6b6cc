"""Asking encoders for samples: which of them, how many at a time, and what when one is lost.

Every encoder has at most ``data.service.in_flight`` requests of a rank; the others wait here, in
their order. An encoder that hangs up, falls silent, takes too long or answers what cannot be is
given up, and its requests go to the front of the queue again: none is lost, and none is answered
twice. Where no encoder is left for a while, the rank encodes by itself.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import xxhash
from torch import Tensor

from hunyuan_train.data.index import SampleRow
from hunyuan_train.data.quarantine import Reason, SampleError
from hunyuan_train.data.service_board import Board, Entry
from hunyuan_train.data.service_config import ServiceConfig
from hunyuan_train.data.service_greeting import Welcome, connect
from hunyuan_train.data.service_library import as_sample
from hunyuan_train.data.store import Sample
from hunyuan_train.data.wire import Garbled, Line

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_LONGEST_REST_S = 60.0
_FIRST_S = 5.0
"""How long it may take at first until encoders that exist are connected."""


@dataclass(kw_only=True, slots=True)
class ServiceCounts:
    """Where the samples of a rank came from."""

    cached: int = 0
    """Finished already: read by this rank, or by an encoder."""
    encoded: int = 0
    """By encoders."""
    fallback: int = 0
    """By this rank."""
    lost_encoders: int = 0
    """Times an encoder was given up."""


@dataclass(eq=False, slots=True)
class Call:
    """A row that the rank needs."""

    row: SampleRow
    number: int
    variant: int
    future: "Future[Sample]" = field(default_factory=Future)

    def settle(self, found: Sample | BaseException) -> None:
        """Give the sample or the error to whoever waits."""
        with suppress(InvalidStateError):  # cancelled
            if isinstance(found, BaseException):
                self.future.set_exception(found)
            else:
                self.future.set_result(found)


@dataclass(eq=False, slots=True)
class _Encoder:
    """A connected encoder."""

    entry: Entry
    mark: int
    line: Line
    window: int
    """Requests of this rank that may be open at a time."""
    flying: dict[int, Call] = field(default_factory=dict)
    since: float = 0.0
    """When it last answered, or got the first of what it has."""


@dataclass(slots=True)
class _Loss:
    times: int
    mark: int
    until: float


class EncoderPool:
    """The encoders that a rank knows, and its requests; see the module.

    Args:
        board: Where encoders register.
        cfg: Patience and numbers in flight.
        settings: Hash of all settings that the numbers depend on.
        index: Name of the index that row numbers refer to.
        check: Raises SampleError or KeyError if an answer has not the shapes of its row.
        find: Returns a finished sample without an encoder, None if there is none.
        fallback: Encodes a row on this rank.
        about: What encoders must say about their samples.
        finders: Threads that look for finished samples.
    """

    def __init__(
        self,
        board: Board,
        cfg: ServiceConfig,
        settings: str,
        index: str,
        check: Callable[[Sample, SampleRow], None],
        find: Callable[[SampleRow, int], Sample | None] | None,
        fallback: Callable[[int, int], Sample],
        about: dict[str, Any],
        finders: int = 2,
    ) -> None:
        self._board = board
        self._cfg = cfg
        self._settings, self._index = settings, index
        self._check = check
        self._find = find
        self._fallback = fallback
        self._about = about
        self._changed = threading.Condition()
        self._waiting: deque[Call] = deque()
        self._encoders: dict[str, _Encoder] = {}
        self._losses: dict[str, _Loss] = {}
        self._trying: set[str] = set()
        self._asked = 0
        self._alone_since: float | None = time.monotonic() + _FIRST_S
        self._stopped = False
        self.counts = ServiceCounts()
        self._finders = ThreadPoolExecutor(finders, "data-find") if find else None
        for target in (self._watch, self._stand_in):
            threading.Thread(target=target, name="data-service", daemon=True).start()

    def submit(self, call: Call) -> None:
        """Have a row encoded, or found."""
        if self._finders is None:
            self._queue(call)
        else:
            self._finders.submit(self._look, call)

    @property
    def encoders(self) -> list[Entry]:
        """The encoders that are connected."""
        with self._changed:
            return [encoder.entry for encoder in self._encoders.values()]

    def close(self) -> None:
        """Hang up on all encoders; what waits is cancelled."""
        with self._changed:
            self._stopped = True
            encoders, self._encoders = list(self._encoders.values()), {}
            calls = [*self._waiting, *(call for e in encoders for call in e.flying.values())]
            self._waiting.clear()
            self._changed.notify_all()
        for encoder in encoders:
            encoder.line.close()
        for call in calls:
            call.future.cancel()
        if self._finders is not None:
            self._finders.shutdown(wait=False, cancel_futures=True)

    def _look(self, call: Call) -> None:
        assert self._find is not None
        if call.future.cancelled():
            return
        found: Sample | None = None
        try:
            found = self._find(call.row, call.variant)
            if found is not None:
                self._check(found, call.row)
        except Exception as error:
            logger.warning("%s in the cache is no use: %r", call.row.sample_id, error)
            found = None
        if found is None:
            self._queue(call)
        else:
            with self._changed:
                self.counts.cached += 1
            call.settle(found)

    def _queue(self, call: Call) -> None:
        with self._changed:
            if self._stopped:
                call.future.cancel()
                return
            self._waiting.append(call)
            self._changed.notify_all()
        self._dispatch()

    def _dispatch(self) -> None:
        """Send what waits to encoders that have room."""
        while True:
            with self._changed:
                while self._waiting and self._waiting[0].future.cancelled():
                    self._waiting.popleft()
                free = [
                    encoder
                    for encoder in self._encoders.values()
                    if len(encoder.flying) < encoder.window
                ]
                if not self._waiting or not free:
                    return
                call = self._waiting.popleft()
                # Ranks that need the same row ask the same encoder, if it has room.
                encoder = max(free, key=lambda encoder: _weight(encoder, call))
                self._asked += 1
                asked = self._asked
                if not encoder.flying:
                    encoder.since = time.monotonic()
                encoder.flying[asked] = call
            try:
                encoder.line.send({"id": asked, "number": call.number, "variant": call.variant})
            except OSError as error:
                self._lose(encoder, f"takes nothing ({error})")

    def _listen(self, encoder: _Encoder) -> None:
        """Receive the answers of one encoder until it is lost."""
        patience = self._cfg.silence_s
        try:
            while True:
                header, tensors = encoder.line.receive()
                if header["op"] != "alive":
                    self._take(encoder, header, tensors)
                elif encoder.flying and time.monotonic() - encoder.since > self._cfg.timeout_s:
                    rest = 4 * self._cfg.timeout_s
                    why = f"has not answered for {self._cfg.timeout_s:g} s"
                    self._lose(encoder, why, rest)
                    return
        except TimeoutError:
            self._lose(encoder, f"gave no sign of life for {patience:g} s")
        except OSError as error:
            self._lose(encoder, f"is gone ({error})")
        except Exception as error:
            self._lose(
                encoder, f"answers what cannot be ({error!r}) and is not asked again", math.inf
            )

    def _take(self, encoder: _Encoder, header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Take one answer.

        Raises:
            Exception: It is none.
        """
        call = encoder.flying.get(header["id"])
        if call is None:
            raise Garbled(f"answer {header['id']} to no request")
        if header["op"] == "bad":
            reason, detail = Reason(header["reason"]), str(header["detail"])
            found: Sample | SampleError = SampleError(call.row.sample_id, reason, detail)
        else:
            found = as_sample(tensors)
            self._check(found, call.row)
        with self._changed:
            if encoder.flying.pop(header["id"], None) is None:
                return  # it was given up, and another has the request
            encoder.since = time.monotonic()
            if header.get("hit"):
                self.counts.cached += 1
            else:
                self.counts.encoded += 1
        call.settle(found)
        self._dispatch()

    def _lose(self, encoder: _Encoder, why: str, rest_s: float = 0.0) -> None:
        """Give up an encoder, and queue what it had again."""
        with self._changed:
            if self._encoders.pop(encoder.entry.id, None) is None:
                return
            calls = [encoder.flying[asked] for asked in sorted(encoder.flying)]
            encoder.flying.clear()
            self._waiting.extendleft(reversed(calls))
            if not self._encoders:
                self._alone_since = time.monotonic()
            self.counts.lost_encoders += 1
            self._changed.notify_all()
        self._note(encoder.entry, encoder.mark, rest_s)
        encoder.line.close()
        logger.warning(
            "encoder %s on %s (pid %d) %s; its %d samples are asked for again; %d encoders left",
            *(encoder.entry.id, encoder.entry.node, encoder.entry.pid, why, len(calls)),
            len(self._encoders),
        )
        self._dispatch()

    def _note(self, entry: Entry, mark: int, rest_s: float) -> None:
        """Leave an encoder alone for a while, and until it shows that it lives."""
        loss = self._losses.setdefault(entry.id, _Loss(0, 0, 0.0))
        loss.times += 1
        with suppress(OSError):
            path = self._board.folder / f"encoder-{entry.id}.json"
            mark = max(mark, path.stat().st_mtime_ns)
        loss.mark = mark
        loss.until = time.monotonic() + max(rest_s, min(_LONGEST_REST_S, 2.0**loss.times / 2))

    def _watch(self) -> None:
        """Connect to encoders as they come, each on a thread: one may hang."""
        while not self._stopped:
            for entry, mark in self._board.entries():
                loss = self._losses.get(entry.id)
                rests = loss is not None and (mark == loss.mark or time.monotonic() < loss.until)
                if rests or entry.id in self._encoders or entry.id in self._trying:
                    continue
                self._trying.add(entry.id)
                threading.Thread(target=self._try, args=(entry, mark), daemon=True).start()
            time.sleep(_POLL_S)

    def _try(self, entry: Entry, mark: int) -> None:
        try:
            if entry.settings != self._settings:
                self._note(entry, mark, math.inf)
                why = "has other settings and is not asked"
                logger.warning("encoder %s on %s %s", entry.id, entry.node, why)
                return
            line, welcome = connect(entry, self._settings, self._index, self._cfg.silence_s)
            window = min(welcome.window, self._cfg.in_flight)
            self._greet(_Encoder(entry, mark, line, window), welcome)
        except (OSError, Garbled) as error:
            self._note(entry, mark, 0.0)
            logger.warning("encoder %s on %s is not reached: %s", entry.id, entry.node, error)
        finally:
            self._trying.discard(entry.id)

    def _greet(self, encoder: _Encoder, welcome: Welcome) -> None:
        entry, about = encoder.entry, welcome.about
        differing = [name for name in self._about if about.get(name) != self._about[name]]
        if differing:
            encoder.line.close()
            self._note(entry, encoder.mark, math.inf)
            logger.warning(
                "encoder %s on %s has %s=%s instead of %s and is not asked; it was started with "
                "other weights",
                *(entry.id, entry.node, differing[0], about.get(differing[0])),
                self._about[differing[0]],
            )
            return
        with self._changed:
            if self._stopped:
                encoder.line.close()
                return
            self._encoders[entry.id] = encoder
            self._alone_since = None
        logger.info("encoder %s on %s (%s) is there", entry.id, entry.node, entry.device)
        name = f"data-encoder-{entry.id}"
        threading.Thread(target=self._listen, args=(encoder,), name=name, daemon=True).start()
        self._dispatch()

    def _stand_in(self) -> None:
        """Encode here what waits while there has been no encoder for a while."""
        while not self._stopped:
            with self._changed:
                call = self._waiting.popleft() if self._waiting and self._is_alone() else None
                if call is None:
                    self._changed.wait(0.2)
                    continue
            if call.future.cancelled():
                continue
            try:
                found: Sample | BaseException = self._fallback(call.number, call.variant)
            except BaseException as error:
                found = error
            with self._changed:
                self.counts.fallback += 1
            call.settle(found)

    def _is_alone(self) -> bool:
        if self._alone_since is None or self._encoders or self._cfg.fallback_s < 0:
            return False
        return time.monotonic() - self._alone_since >= self._cfg.fallback_s


def _weight(encoder: _Encoder, call: Call) -> int:
    return xxhash.xxh3_64_intdigest(f"{encoder.entry.id} {call.number}".encode())

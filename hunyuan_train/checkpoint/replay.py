"""The update after a checkpoint, kept beside it: who resumes from it has to compute it again."""

import hashlib
import json
import logging
import math
import os
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hunyuan_train.checkpoint.config import CheckpointConfig
from hunyuan_train.checkpoint.digest import hash_json
from hunyuan_train.checkpoint.ranks import Ranks
from hunyuan_train.checkpoint.storage import step_folder

REPLAY = "replay.json"
_SAMPLES_MODULUS = 1 << 48
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayToken:
    """What one update came to, over all ranks."""

    samples: str
    """:func:`samples_text` of the sum of :func:`samples_digest` over ranks with distinct data."""
    num_samples: int
    loss: float
    grad_norm: float
    dealing: str
    """How samples are dealt: ranks with distinct data and micro-batches of each."""
    layout: str
    """How the model was cut, and on how many ranks."""
    versions: str
    """Kind of device and version of torch."""
    exact: bool
    """Whether the same layout and versions compute the same bits: not with atomics on a GPU."""


def samples_digest(samples: Iterable[tuple[str, int]]) -> int:
    """Return a digest of (sample id, epoch) pairs that adds up over ranks.

    It is below 2^48, so the sum over 32,000 ranks fits an int64; a float64 would round it.
    """
    total = 0
    for identity, epoch in samples:
        digest = hashlib.blake2b(f"{epoch}:{identity}".encode(), digest_size=6).digest()
        total += int.from_bytes(digest, "little")
    return total % _SAMPLES_MODULUS


def samples_text(total: int) -> str:
    """Return the sum of all ranks' digests as it is kept: the same however samples were dealt."""
    return f"{total % _SAMPLES_MODULUS:012x}"


class Replay:
    """Writes the token of each checkpoint once both are there, and compares after a restore."""

    def __init__(self, folder: Path, cfg: CheckpointConfig, ranks: Ranks) -> None:
        """Prepare; ``folder`` holds the ``step-...`` folders."""
        self._folder, self._cfg, self._ranks = folder, cfg, ranks
        self._awaited: set[int] = set()
        self._tokens: dict[int, ReplayToken] = {}
        self._expected: tuple[int, ReplayToken] | None = None

    def due(self, step: int) -> bool:
        """Return whether the update that led to ``step`` is wanted."""
        before = self._expected[0] if self._expected else -1
        return step - 1 in self._awaited or step - 1 == before

    def begun(self, step: int) -> None:
        """Want the update after ``step``, of which a checkpoint has begun."""
        if self._cfg.replay:
            self._awaited.add(step)

    def ended(self, step: int, *, saved: bool) -> None:
        """Write the token of ``step`` if it is known already, or drop it with its checkpoint."""
        if not saved:
            self._awaited.discard(step)
            self._tokens.pop(step, None)
        elif step in self._tokens:
            self._write(step, self._tokens.pop(step))

    def record(self, step: int, token: ReplayToken, *, saved: bool) -> None:
        """Take the update after ``step``; it is written now or once the checkpoint is there."""
        if step not in self._awaited:
            return
        self._awaited.discard(step)
        if saved:
            self._write(step, token)
        else:
            self._tokens[step] = token

    def _write(self, step: int, token: ReplayToken) -> None:
        if not self._ranks.is_first:
            return
        body = {"step": step, **asdict(token)}
        path = step_folder(self._folder, step) / REPLAY
        try:
            # No fsync: it would wait for the disk, and a token that is lost costs one comparison.
            scratch = path.with_name(f"{REPLAY}.{os.getpid()}")
            scratch.write_text(json.dumps({**body, "sha256": hash_json(body)}, indent=1))
            scratch.replace(path)
        except OSError as error:
            log.warning("cannot write the replay token of step %d: %s", step, error)

    def expect(self, step: int, *, wanted: bool = True) -> None:
        """Read the token of the checkpoint just restored; every rank calls it."""
        self._awaited.clear()
        self._tokens.clear()
        self._expected = None
        if not (self._cfg.replay and wanted):
            return
        token: ReplayToken | None = None
        if self._ranks.is_first:
            token = self._read(step)
        token = self._ranks.from_first(token)
        self._expected = (step, token) if token else None
        if token is None:
            # It is written as soon as the step after is done this time.
            self._awaited.add(step)

    def _read(self, step: int) -> ReplayToken | None:
        path = step_folder(self._folder, step) / REPLAY
        try:
            body: dict[str, Any] = json.loads(path.read_text())
            stored = body.pop("sha256")
            if stored != hash_json(body) or body.pop("step") != step:
                raise ValueError("its own hash does not fit")
            return ReplayToken(**body)
        except FileNotFoundError:
            log.info(
                "%s is not there: the run ended before the update after step %d was done, so that "
                "update is not compared",
                path,
                step,
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s cannot be used, so the update is not compared: %s", path, error)
        return None

    def check(self, token: ReplayToken) -> None:
        """Compare the first update after a restore with the one of the run that saved it.

        Raises:
            ValueError: They differ; the message names both values. Raised on every rank.
        """
        if self._expected is None:
            return
        step, expected = self._expected
        self._expected = None
        other_samples = expected.samples != token.samples and expected.dealing != token.dealing
        if self._ranks.from_first(other_samples):
            if self._ranks.is_first:
                log.warning(
                    "the update after step %d has other samples with %s than it had with %s, so it "
                    "is not compared",
                    step,
                    token.dealing,
                    expected.dealing,
                )
            return
        problem = self._ranks.from_first(difference(expected, token, self._cfg.replay_tolerance))
        if problem:
            raise ValueError(
                f"the update after step {step} is not the one of the run that saved it: {problem}; "
                "set checkpoint.replay=false to go on all the same"
            )
        if self._ranks.is_first:
            log.info("the update after step %d was computed again as it was before", step)


def difference(expected: ReplayToken, found: ReplayToken, tolerance: float) -> str:
    """Return how two computations of one update differ, "" if they agree.

    Bitwise where layout, device and torch are the same and compute the same bits each time, else
    within ``tolerance`` relative to the larger value.
    """
    if (expected.samples, expected.num_samples) != (found.samples, found.num_samples):
        return (
            f"it trained on other samples (digest {found.samples} of {found.num_samples} samples "
            f"here, {expected.samples} of {expected.num_samples} there), so data or loader changed"
        )
    same_layout = expected.layout == found.layout
    exact = same_layout and expected.versions == found.versions and expected.exact and found.exact
    for name in ("loss", "grad_norm"):
        theirs, ours = getattr(expected, name), getattr(found, name)
        if _bits(theirs) == _bits(ours) or (math.isnan(theirs) and math.isnan(ours)):
            continue
        if exact:
            return (
                f"{name} is {ours!r} here and was {theirs!r} there, on the same samples and layout,"
                " so the state was not restored or this machine computes wrongly"
            )
        if not abs(theirs - ours) <= tolerance * max(abs(theirs), abs(ours)):
            return (
                f"{name} is {ours!r} here ({found.layout}) and was {theirs!r} there "
                f"({expected.layout}), more than checkpoint.replay_tolerance={tolerance} apart, so "
                "the layouts do not compute the same or the state was not restored"
            )
    return ""


def _bits(value: float) -> bytes:
    return struct.pack("<d", value)

"""Why a source file is left out: one reason code and one true sentence per file."""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """The kinds of causes, used to count them."""

    missing = "missing"
    unreadable = "unreadable"
    empty = "empty"
    mislabelled = "mislabelled"
    unrecognised = "unrecognised"
    no_video = "no_video"
    truncated = "truncated"
    damaged = "damaged"
    too_large = "too_large"
    too_short = "too_short"
    no_caption = "no_caption"
    manifest = "manifest"
    not_finite = "not_finite"


class MediaError(Exception):
    """A source that cannot become a sample; the run goes on without it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineRow:
    """One line of ``quarantine.jsonl``."""

    file: str
    """Path relative to the source folder; a manifest line is written ``manifest.jsonl:12``."""
    reason: Reason
    detail: str

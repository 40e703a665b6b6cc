"""Why a file or a sample is left out: one reason code and one true sentence for each."""

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
    checksum = "checksum"
    crop = "crop"
    refused = "refused"
    """Of an update that ``resilience.guard`` refused; one of its samples may be to blame."""


class MediaError(Exception):
    """A source that cannot become a sample; the run goes on without it."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class SampleError(Exception):
    """A stored or decoded sample that cannot be trained on; another one takes its place."""

    def __init__(self, sample_id: str, reason: Reason, detail: str) -> None:
        super().__init__(f"{sample_id}: {reason}: {detail}")
        self.sample_id = sample_id
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["SampleError"], tuple[str, Reason, str]]:
        """Let the error travel between processes."""
        return type(self), (self.sample_id, self.reason, self.detail)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuarantineRow:
    """One line of ``quarantine.jsonl``."""

    file: str
    """Path relative to the source folder; a manifest line is written ``manifest.jsonl:12``."""
    reason: Reason
    detail: str

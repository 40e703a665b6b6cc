"""What is being evaluated now, on disk, so that a restart can leave out what ended the run."""

import json
import logging
import os
from pathlib import Path

log = logging.getLogger(__name__)

FILE_NAME = "evaluation_notes.json"
_MOST_DEATHS = 2
"""After so many deaths in turn in a part of the evaluation, that part is off."""


class EvaluationNotes:
    """Notes of one stage: written before each part of an evaluation, and cleared after it.

    A part that was begun and not finished when the run starts again was the end of it: by a crash,
    by a hang that the watchdog ended, or by chance. It is left out at that step from then on.
    """

    def __init__(self, folder: Path) -> None:
        """Read what an earlier start of the run left; one process per run does this."""
        self._path = folder / FILE_NAME
        found = json.loads(self._path.read_text()) if self._path.is_file() else {}
        self._skipped: list[tuple[str, int]] = [(p, s) for p, s in found.get("skipped", [])]
        self._deaths: dict[str, int] = found.get("deaths", {})
        if begun := found.get("begun"):
            part, step = begun
            self._skipped.append((part, step))
            self._deaths[part] = self._deaths.get(part, 0) + 1
            self._write(None)
            log.warning(
                "THE RUN ENDED WHILE EVALUATING (%s after step %d): that is left out this time. %s",
                *(part, step, self._fate(part)),
            )

    def _fate(self, part: str) -> str:
        if self._off(part):
            return f"It is the second time in turn, so {part} are off for the rest of this stage."
        return f"See {self._path.parent} for the cause; should it happen again, it is off."

    def _off(self, part: str) -> bool:
        return self._deaths.get(part, 0) >= _MOST_DEATHS

    def allows(self, part: str, step: int) -> bool:
        """Return whether a part may be evaluated after ``step``."""
        return not self._off(part) and (part, step) not in self._skipped

    def begin(self, part: str, step: int) -> None:
        """Note that a part is about to be evaluated; it is on disk when this returns."""
        self._write((part, step))

    def finish(self, part: str) -> None:
        """Note that it ended well."""
        self._deaths.pop(part, None)
        self._write(None)

    def _write(self, begun: tuple[str, int] | None) -> None:
        notes = {"begun": begun, "skipped": self._skipped, "deaths": self._deaths}
        scratch = self._path.with_suffix(".tmp")
        with scratch.open("w") as file:
            file.write(json.dumps(notes))
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(self._path)

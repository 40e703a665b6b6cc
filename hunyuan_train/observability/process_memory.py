"""Peak memory of this process and everything it started, sampled while a block runs."""

import threading
from pathlib import Path
from types import TracebackType


def tree_resident_bytes(root_pid: int) -> int:
    """Return the proportional set size of a process and its descendants (Linux), in bytes.

    Proportional: a page shared by n processes counts 1/n in each, so the sum is what the tree uses.
    """
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):  # it ended while we looked
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.name))
    total, pending = 0, [root_pid]
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        total += _proportional_bytes(pid)
    return total


def _proportional_bytes(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    line = next((row for row in text.splitlines() if row.startswith("Pss:")), "Pss: 0 kB")
    return int(line.split()[1]) * 1024


class PeakTreeMemory:
    """Context manager that samples the process tree's memory; ``peak_bytes`` is the maximum."""

    def __init__(self, root_pid: int, every_s: float = 2.0) -> None:
        self.peak_bytes = 0
        self._root_pid = root_pid
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, tree_resident_bytes(self._root_pid))
            if self._stop.wait(self._every_s):
                return

    def __enter__(self) -> "PeakTreeMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

"""Jobs of fake ranks: scripts without torch, run by the real supervisor in its own process.

As a program: ``fake_job.py RUN_DIR SCRIPT [field=value ...]`` with fields of LaunchConfig, plus
``watchdog_s`` and ``preload``.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

RANK = """
import json, os, signal, socket, sys, time
from pathlib import Path
rank, attempt = int(os.environ["RANK"]), int(os.environ["HUNYUAN_ATTEMPT"])
world, node = int(os.environ["WORLD_SIZE"]), int(os.environ["GROUP_RANK"])
run_dir = Path(os.environ["HUNYUAN_CRASH_FILE"]).parents[2]
def note(name, value=""):
    whole = run_dir / f".{name}-{attempt}-{rank}"
    whole.write_text(str(value) or str(os.getpid()))
    whole.replace(run_dir / whole.name[1:])
def save(step):
    (run_dir / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
def newest():
    steps = [int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step-*")]
    return max(steps, default=0)
def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
asked = []
def serve_until_asked():
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    note("up")
    wait_for(lambda: asked, 120)
    sys.exit(75)
"""


def launch(run_dir: Path, body: str, *fields: str) -> subprocess.Popen[str]:
    """Start a job whose ranks run ``RANK`` and then ``body``."""
    run_dir.mkdir(parents=True, exist_ok=True)
    script = run_dir / "rank.py"
    if not script.exists():
        script.write_text(RANK + body)
    return subprocess.Popen(
        [sys.executable, __file__, str(run_dir), str(script), *fields],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


PATIENCE = 4
"""Limits are meant for a quiet machine; a busy one may take this many times as long."""


def finish(process: subprocess.Popen[str], timeout_s: float = 60) -> tuple[int, str]:
    """Return exit code and messages of a job."""
    try:
        _, text = process.communicate(timeout=PATIENCE * timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"the job did not end; it said:\n{process.communicate()[1]}") from None
    return process.returncode, text


def run(run_dir: Path, body: str, *fields: str, timeout_s: float = 60) -> tuple[int, str]:
    """Run a job to its end."""
    return finish(launch(run_dir, body, *fields), timeout_s)


def poll(condition: Callable[[], Any], what: str, timeout_s: float = 60) -> Any:
    """Wait until ``condition`` is true and return its value."""
    end = time.monotonic() + PATIENCE * timeout_s
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.01)
    return value


def descendants(pid: int) -> list[int]:
    """Return all processes below one."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        children = parents.get(todo.pop(), [])
        found += children
        todo += children
    return found


def runs(pid: int) -> bool:
    """Return whether a process lives."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def notes(run_dir: Path, name: str) -> dict[tuple[int, int], str]:
    """Return what ranks noted under ``name``, by attempt and rank."""
    found = {}
    for path in run_dir.glob(f"{name}-*-*"):
        attempt, rank = path.name.removeprefix(f"{name}-").split("-")
        found[int(attempt), int(rank)] = path.read_text()
    return found


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """Return the events of one kind."""
    lines = (run_dir / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def main(run_dir: str, script: str, *fields: str) -> int:
    import logging

    from hunyuan_train.parallel.config import ParallelConfig
    from hunyuan_train.resilience.config import LaunchConfig, ResilienceConfig
    from hunyuan_train.resilience.layouts import Job
    from hunyuan_train.resilience.supervisor import Launch, Supervisor

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(message)s")
    values: dict[str, Any] = {"backoff_s": 0.1, "grace_s": 10}
    for text in fields:
        name, _, value = text.partition("=")
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    resilience = ResilienceConfig(watchdog_s=values.pop("watchdog_s", 0))
    resilience.watchdog_min_s = min(resilience.watchdog_min_s, resilience.watchdog_s)
    preload = values.pop("preload", [])
    cfg = LaunchConfig(**values)
    launch = Launch(
        cfg=cfg,
        resilience=resilience,
        job=Job(
            parallel=ParallelConfig(),
            world_size=cfg.nodes * cfg.ranks_per_node,
        ),
        run_dir=Path(run_dir),
        argv=(script,),
        preload=tuple(preload),
    )
    return Supervisor(launch).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Kill a curriculum at seeded times, start it again, and compare all of its weights.

A tiny curriculum with branches (one carries everything, one gains a guidance embedder) runs once
undisturbed and then once per kill: SIGKILL to all its processes at a time drawn from its course,
one in each of as many equal parts, then the same command to the end. Every tensor of every stage
(weights, average, moments) has to be the same to the last bit, and every row of metrics.

    python benchmarks/curriculum_kills.py
    python benchmarks/curriculum_kills.py --ranks 1 --kills 3 --seed 7
"""

import argparse
import json
import math
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from forked import Job  # noqa: E402
from tiny_run import make_data, overrides, rows  # noqa: E402

from hunyuan_train.checkpoint.storage import Manifest  # noqa: E402
from hunyuan_train.engine.ledger import LEDGER_NAME, Ledger, Status  # noqa: E402

STAGES = {
    "base": "stage:default",
    "on": "stage:default,after:base,carry:[weights,ema,optimizer,schedule,loader]",
    "told": "stage:default,after:base,transform:[guidance_embed],"
    "overrides:['model.guidance_embed=true']",
}
SETTINGS = (
    "stage.steps=6", "checkpoint.every_steps=3", "data.train_durations=[1,5]",
    "optimizer.schedule=cosine", "certify.at_start=false", "logging.level=warning",
)  # fmt: skip
COMPARED = ("step", "loss", "grad_norm", "lr", "tokens", "samples")
IN_BACKGROUND = 5
"""One of so many runs writes its checkpoints in the background, by a process slow to start."""
SOONER = 0.6
"""How much earlier each next try of a kill is."""
TRIES = 5
"""Draws of a time until one hits a run that is still going."""


def start(data: Path, run: Path, ranks: int, *, background: bool = False) -> Job:
    """Start the curriculum; ``background`` is how checkpoints are written."""
    nodes = ",".join(f"{name}:{{{node}}}" for name, node in STAGES.items())
    extra = (f"curriculum.stages={{{nodes}}}", f"checkpoint.asynchronous={str(background).lower()}")
    return Job("curriculum", overrides(data, run, *extra, *SETTINGS), ranks, run / "log")


def outcome(run: Path) -> dict[str, tuple[dict[str, str], list[list[float]]]]:
    """Return digests of all tensors and the rows of metrics, by stage."""
    found = {}
    for name, record in Ledger.read(run).stages.items():
        assert record.state is Status.done
        table = [[row[key] for key in COMPARED] for row in rows(run / record.folder)]
        found[name] = (Manifest.read(run / record.checkpoint).digests, table)
    return found


def place(run: Path) -> str:
    """Say where a curriculum was when it was killed."""
    if not (run / LEDGER_NAME).is_file():
        return "before the first stage"
    stages = Ledger.read(run).stages
    running = [name for name, record in stages.items() if record.state is Status.running]
    if running:
        return f"in {running[0]}"
    return f"after {sum(record.state is Status.done for record in stages.values())} stages"


def moment(straight: Path, share: float) -> tuple[str, float]:
    """Return the stage, and the seconds after its begin, at a share of the undisturbed course."""
    stages = Ledger.read(straight).stages
    first = min(record.started for record in stages.values())
    time_s = first + share * (max(record.ended for record in stages.values()) - first)
    begun = {n: record.started for n, record in stages.items() if record.started <= time_s}
    name = max(begun, key=lambda stage: begun[stage])
    return name, time_s - begun[name]


class Reached:
    """True from so many seconds after a stage has begun."""

    def __init__(self, run: Path, stage: str, after_s: float) -> None:
        self._run, self._stage, self._after_s = run, stage, after_s
        self._begun = math.inf

    def __call__(self) -> bool:
        if self._begun == math.inf and (self._run / LEDGER_NAME).is_file():
            record = Ledger.read(self._run).stages[self._stage]
            if record.state is not Status.waiting:
                self._begun = time.monotonic()
        return time.monotonic() >= self._begun + self._after_s


def measure(data: Path, folder: Path, ranks: int, kills: int, draws: random.Random) -> dict:
    """Kill ``kills`` runs of a number of ranks and compare each."""
    straight = folder / f"straight-{ranks}"
    start(data, folder / f"first-{ranks}", ranks).wait()  # what is only slow once is done now
    started = time.monotonic()
    start(data, straight, ranks).wait()
    whole_s = time.monotonic() - started
    wanted = outcome(straight)
    places: Counter[str] = Counter()
    same = 0
    for number in range(kills):
        background = number % IN_BACKGROUND == 1
        for attempt in range(TRIES):
            run = folder / f"{ranks}-{number}-{attempt}"
            stage, after_s = moment(straight, (number + draws.random()) / kills)
            job = start(data, run, ranks, background=background)
            # A machine that was busy before may be faster now.
            if job.kill_when(Reached(run, stage, after_s * SOONER**attempt)):
                break
        else:
            raise AssertionError(f"{TRIES} runs ended before they could be killed")
        places[place(run)] += 1
        start(data, run, ranks, background=background).wait()
        equal = outcome(run) == wanted
        same += equal
        print(f"{ranks} ranks, kill {number + 1}: {'same' if equal else 'OTHER'}", file=sys.stderr)
    return {
        "bitwise_equal": {"value": same, "target": f"= {kills}", "holds": same == kills},
        "killed": {"value": kills, "where": dict(places)},
        "undisturbed_s": {"value": round(whole_s, 1)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=10, help="per number of ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one kill on one rank")
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.kills = [1], 1
    draws = random.Random(args.seed)
    figures = {}
    with tempfile.TemporaryDirectory(prefix="kills-") as name:
        data = make_data(Path(name) / "data")  # before any rank is forked, which is from a server
        for ranks in args.ranks:
            found = measure(data, Path(name), ranks, args.kills, draws)
            figures |= {f"{key}_{ranks}_ranks": figure for key, figure in found.items()}
    machine = {"device": platform.machine(), "python": platform.python_version()}
    print(json.dumps({"benchmark": "curriculum_kills", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()

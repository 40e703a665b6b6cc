"""What training pays for encoders of their own: step and processor time against stored latents.

Two ranks train on the same samples from a latent store, from two encoder processes that have made
nothing yet (cold), and from what those have kept (cached), in turn, several times. Encoders run at
low priority, but where there are as many cores as ranks they take time from training, so a cold
step is slower by what encoding costs. What does not depend on the cores is the processor time of
the ranks themselves; on a machine with devices of the encoders' own the cold ratio comes close to
that.

Then a run whose encoders are killed, one and later all: how many updates it lacks, whether its
losses are those of the undisturbed run, and how long the slowest of its updates took.

    python benchmarks/latent_service.py
    python benchmarks/latent_service.py --repeats 1 --steps 20
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import Report, at_most

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
sys.path.insert(0, str(ROOT))

from forked import Job  # noqa: E402 - below tests/support

from hunyuan_train.data.service_board import Board  # noqa: E402
from hunyuan_train.data.shapes import write_shapes_dataset  # noqa: E402
from hunyuan_train.models.vae.config import VaeConfig  # noqa: E402
from hunyuan_train.models.vae.model import CausalVae3D  # noqa: E402
from hunyuan_train.models.vae.state_dict import save_vae  # noqa: E402

RANKS, ENCODERS, SAMPLES = 2, 2, 4
"""Ranks, encoder processes, samples of an update."""
FIRST = 4
"""Updates that are not counted: kernels are chosen, encoders come."""
AHEAD_GIB = 0.0005
"""Room for a few updates: encoders work throughout a cold run, and not only before its first."""
TARGET = 1.03


class Runs:
    """Runs over one set of clips."""

    def __init__(self, folder: Path, steps: int, quick: bool) -> None:
        self.folder, self.steps = folder, steps
        torch.manual_seed(0)
        # Every sample of a run is new: there are as many as it draws.
        write_shapes_dataset(
            folder / "clips", steps * SAMPLES, 0, 0, frame_sizes=[(64, 64)], clip_frames=[17]
        )
        vae = VaeConfig(block_channels=[4, 8, 8, 8], layers_per_block=1, norm_groups=4)
        save_vae(CausalVae3D(vae), folder / "vae")
        width = ["model.hidden_size=32", "model.num_heads=2", "model.rope_axes=[4,6,6]"]
        if not quick:
            width = ["model.hidden_size=192", "model.num_heads=4", "model.rope_axes=[12,18,18]",
                     "model.num_double_blocks=3", "model.num_single_blocks=6"]  # fmt: skip
        self._shared = [
            "data=shapes", f"data.source={folder / 'clips'}", "data.anchors=[64]",
            "data.durations=[17]", "data.max_batch=2", f"data.global_samples={SAMPLES}",
            "data.bucket_stride=64", "data.assign=nearest", "data.max_crop_loss=1",
            f"run.vae={folder / 'vae'}", "run.device=cpu", "run.threads=1",
            "optimizer.warmup_steps=2", *width, f"stage.steps={steps}", "logging.every_steps=1",
            "logging.progress=off", "checkpoint.asynchronous=false",
            f"data.prefetch_gib={AHEAD_GIB}",
        ]  # fmt: skip
        self.start("precompute", "store", [f"data.latents={folder / 'store'}"], ranks=1).wait(900)

    def start(self, verb: str, name: str, extra: list[str], ranks: int = RANKS) -> Job:
        """Start a verb with ``run.dir`` of this name."""
        run = self.folder / name
        return Job(verb, [*self._shared, f"run.dir={run}", *extra], ranks, run / "log")

    def rows(self, name: str) -> list[dict[str, float]]:
        """Return the rows of a run so far."""
        path = self.folder / name / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def served(self, name: str, kept: str, *extra: str) -> Job:
        """Start a run from encoders that keep what they make in the folder ``kept``."""
        service = [
            "data.encode=service", f"data.latents={self.folder / 'index'}",
            f"data.service.folder={self.folder / kept}", f"data.service.processes={ENCODERS}",
            "data.service.devices=[cpu]", "data.service.nice=19", "data.workers=1",
        ]  # fmt: skip
        return self.start("train", name, [*service, *extra])

    def stored(self, name: str) -> Job:
        """Start a run from stored latents."""
        return self.start("train", name, [f"data.latents={self.folder / 'store'}"])


def measure(runs: Runs, name: str, job: Job) -> dict[str, float]:
    """Wait for a run; return the seconds and the ranks' processor seconds of an update."""
    used: dict[int, float] = {}
    while job.running():
        done = len(runs.rows(name))
        if done not in used:
            seconds = [processor_s(pid) for pid in job.pids]
            if all(seconds):
                used[done] = sum(seconds)
        time.sleep(0.02)
    job.wait()
    rows = runs.rows(name)
    counted = [done for done in used if FIRST <= done < len(rows)]
    spent = used[counted[-1]] - used[counted[0]]
    return {
        "step_s": statistics.mean(row["step_s"] for row in rows[FIRST:]),
        "median_s": statistics.median(row["step_s"] for row in rows[FIRST:]),
        "processor_s": spent / (counted[-1] - counted[0]),
        "data_wait": statistics.mean(row["data_wait"] for row in rows[FIRST:]),
        "cached": rows[-1].get("service_cached", 0),
        "encoded": rows[-1].get("service_encoded", 0),
        "fallback": rows[-1].get("service_fallback", 0),
    }


def processor_s(pid: int) -> float:
    """Return the processor time of a process without its children, 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill_encoders(runs: Runs) -> dict[str, Any]:
    """Kill one encoder in the first half of a run and all later; return what came of it."""
    job = runs.served(
        "killed", "killed-service", "data.service.cache_gib=0", "data.service.fallback_s=0",
    )  # fmt: skip
    board = Board(runs.folder / "killed-service")
    kills: list[int] = []
    for share, most in ((0.35, 1), (0.6, ENCODERS)):
        while job.running() and len(runs.rows("killed")) < share * runs.steps:
            time.sleep(0.01)
        for entry, _ in board.entries()[:most]:
            try:
                os.kill(entry.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        kills.append(len(runs.rows("killed")))
    job.wait()
    rows = runs.rows("killed")
    slowest = max(row["step_s"] for row in rows[kills[0] :])
    return {
        "killed_after": kills,
        "missing": runs.steps - len({row["step"] for row in rows}),
        "losses": [row["loss"] for row in rows],
        "slowest_s": slowest,
        "usual_s": statistics.median(row["step_s"] for row in rows[FIRST:]),
        "lost": rows[-1]["service_lost_encoders"],
        "fallback": rows[-1]["service_fallback"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="of each kind of run, in turn")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help="one of each, tiny")
    args = parser.parse_args()
    if args.quick:
        args.repeats, args.steps = 1, 10
    report = Report("latent_service", torch.device("cpu"))
    kinds: dict[str, list[dict[str, float]]] = {"stored": [], "cold": [], "cached": []}
    with tempfile.TemporaryDirectory(prefix="service-") as name:
        runs = Runs(Path(name), args.steps, args.quick)
        for number in range(args.repeats):
            for kind, found in kinds.items():
                run = f"{kind}-{number}"
                job = runs.stored(run) if kind == "stored" else runs.served(run, f"kept-{number}")
                found.append(measure(runs, run, job))
                print(run, json.dumps(found[-1]), file=sys.stderr, flush=True)
        losses = {kind: [row["loss"] for row in runs.rows(f"{kind}-0")] for kind in kinds}

        def ratio(kind: str, what: str) -> float:
            pairs = zip(kinds[kind], kinds["stored"], strict=True)
            return round(statistics.median(one[what] / other[what] for one, other in pairs), 4)

        def all_of(what: str) -> dict[str, list[float]]:
            return {kind: [round(run[what], 4) for run in found] for kind, found in kinds.items()}

        report.add("cached_step_ratio", at_most(ratio("cached", "step_s"), TARGET))
        report.add("cached_processor_ratio", at_most(ratio("cached", "processor_s"), TARGET))
        report.add("cold_processor_ratio", at_most(ratio("cold", "processor_s"), TARGET))
        cores = {"cores": os.cpu_count(), "processes": RANKS + ENCODERS}
        report.add("cold_step_ratio", {"value": ratio("cold", "step_s"), **cores})
        for what in ("step_s", "median_s", "processor_s", "data_wait", "encoded", "cached"):
            report.add(what, all_of(what))
        same = losses["stored"] == losses["cold"] == losses["cached"]
        report.add("losses_equal_to_stored", {"value": same, "holds": same})
        killed = kill_encoders(runs)
        same = killed.pop("losses") == losses["cold"]
        report.add("killed_missing_updates", at_most(killed["missing"], 0, losses_equal=same))
        report.add("killed_slowest_step_s", {"value": round(killed["slowest_s"], 3), **killed})
    report.finish()


if __name__ == "__main__":
    main()

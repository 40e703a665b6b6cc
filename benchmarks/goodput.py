"""Replay failures through the real supervisor, compare with the model, project to 1,024 GPUs.

Measured here:
1. Traces of failures, drawn with the causes that Llama 3 met (419 in 54 days) at the rates of 1,024
   and 16,384 GPUs, are replayed in scaled time: the supervisor, the watchdog, heartbeats, events
   and the accounting are the real ones, the ranks are light processes that sleep instead of
   computing and keep the number of their updates instead of tensors. Detection and restart do not
   scale: their measured seconds go into the model, which then has to predict the share kept.
2. The stall of a checkpoint, by benchmarks/checkpoint.py (--checkpoint-json takes its output).
3. The restart of a real run of two ranks that loses one (--restart-s leaves it out).

Projected: the share that is kept at 1,024 and 16,384 GPUs, by the model with these figures. What
this machine does not have (a GPU's context, NCCL on 128 nodes, 13 B parameters to restore) enters
as --allowance-s, a hang as --hang-s, which is what the watchdog is set to.

    python benchmarks/goodput.py
    python benchmarks/goodput.py --seconds 20 --checkpoint-json checkpoint.json --restart-s 3
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from hunyuan_train.resilience.events import read_events
from hunyuan_train.resilience.goodput import Goodput, Use, account
from hunyuan_train.resilience.interval import GPUS_MTBF_H, Copies, best, kept_share

ROOT = Path(__file__).resolve().parents[1]
HOUR_S = 0.5
"""Scaled: what an hour of the trace takes."""
RANKS, SEEDS = 2, 2
STALL_S = 0.002
WATCHDOG_S = 0.6
ERROR_TARGET, SHARE_TARGET = 0.03, 0.995

CAUSES = {
    "exception": 148 + 72 + 19 + 17 + 6 + 3,  # GPU, HBM, SRAM, processor, corruption, SSD
    "sigsegv": 54 + 2 + 2 + 2,  # software bug, dependency, CPU, memory
    "loop": 35 + 7,  # network, NCCL watchdog: nothing dies, everybody waits
    "sigstop": 6,  # heat and sensors
    "machine": 32 + 7 + 3 + 2 + 2,  # maintenance, NIC, power, chassis, expansion board
}
"""How the unexpected interruptions of Llama 3 show in a rank; they add up to 419."""

RANK = """
import json, mmap, os, signal, struct, sys, time
from pathlib import Path
from hunyuan_train.resilience.clock import OTHER, STEP, Clock
from hunyuan_train.resilience.events import EventKind, Events
from hunyuan_train.resilience.heartbeat import Heartbeat

rank, attempt = int(os.environ["RANK"]), int(os.environ["HUNYUAN_ATTEMPT"])
run_dir = Path(os.environ["HUNYUAN_JOB_FOLDER"])
plan = json.loads((run_dir / "plan.json").read_text())
world, saved = plan["ranks"], run_dir / "checkpoints"

def strike(kind, step):
    Events(run_dir, rank=rank).emit(
        EventKind.fault, fault="sigkill" if kind == "machine" else kind, step=step)
    if kind == "exception":
        raise RuntimeError(f"CUDA error: uncorrectable ECC error in attempt {attempt}")
    if kind in ("sigsegv", "sigstop", "machine"):
        names = {"sigsegv": signal.SIGSEGV, "sigstop": signal.SIGSTOP, "machine": signal.SIGKILL}
        os.kill(os.getpid(), names[kind])
    while True:
        time.sleep(1)

def main():
    clock = Clock(run_dir, "", rank, every_s=0.2)
    place = run_dir / f"meet-{attempt}"
    with open(place, "a+b") as file:
        file.truncate(8 * world)
        board = mmap.mmap(file.fileno(), 8 * world)
    def meet(number):
        struct.pack_into("q", board, 8 * rank, number)
        while min(struct.unpack_from(f"{world}q", board)) < number:
            time.sleep(0.0005)
    with Heartbeat(run_dir, attempt, rank) as heart:
        step = max((int(p.name[5:]) for p in saved.glob("step-*")), default=0)
        meet(1)
        clock.ready(step)
        fault = plan["faults"][attempt] if attempt < len(plan["faults"]) else None
        first, begun = step, time.monotonic()
        copied, stalled_s = begun, 0.0
        while fault is not None or step == first:
            clock.lap(OTHER)
            started = time.monotonic()
            heart.phase("forward")
            struck = fault is not None and started - begun >= fault["after_s"]
            if struck and (rank == fault["rank"] or fault["kind"] == "machine"):
                strike(fault["kind"], step)
            time.sleep(plan["step_s"])
            step += 1
            with heart.phase("collective"):
                meet(1 + step - first)
            clock.lap(STEP)
            clock.done(step)
            heart.beat(step, time.monotonic() - started)
            if rank == 0 and time.monotonic() - copied >= plan["every_s"]:
                with heart.phase("save"):
                    time.sleep(plan["stall_s"])
                    old = next(saved.glob("step-*"), saved / "step-0")
                    old.mkdir(parents=True, exist_ok=True)
                    old.rename(saved / f"step-{step:08d}")
                    clock.lap("save")
                    clock.done(step, tell=True)
                copied = time.monotonic()
        clock.leave(None)

main()
"""


def trace(gpus: int, seconds: float, every_s: float, seed: int) -> dict[str, Any]:
    """Return failures whose training times add up to about ``seconds``, in scaled time."""
    draw = random.Random(seed)
    mean_s = GPUS_MTBF_H[gpus] * HOUR_S
    faults = []
    for _ in range(max(round(seconds / (mean_s + 0.3)), 3)):
        kind = draw.choices(list(CAUSES), list(CAUSES.values()))[0]
        after_s = draw.expovariate(1 / mean_s)
        faults.append({"kind": kind, "after_s": after_s, "rank": draw.randrange(RANKS)})
    return {
        "faults": faults,
        "ranks": RANKS,
        "step_s": 0.01,
        "every_s": every_s,
        "stall_s": STALL_S,
    }


def supervise(run_dir: Path) -> int:
    """Run one job of light ranks to its end."""
    from hunyuan_train.parallel.config import ParallelConfig
    from hunyuan_train.resilience.config import LaunchConfig, ResilienceConfig
    from hunyuan_train.resilience.layouts import Job
    from hunyuan_train.resilience.supervisor import Launch, Supervisor

    cfg = LaunchConfig(ranks_per_node=RANKS, max_restarts=100_000, backoff_s=0.05)
    resilience = ResilienceConfig(watchdog_s=WATCHDOG_S)
    resilience.watchdog_min_s = WATCHDOG_S / 2
    return Supervisor(
        Launch(
            cfg=cfg,
            resilience=resilience,
            job=Job(parallel=ParallelConfig(), world_size=RANKS),
            run_dir=run_dir,
            argv=(str(run_dir / "rank.py"),),
            preload=("hunyuan_train.resilience.clock", "hunyuan_train.resilience.heartbeat"),
        )
    ).run()


def replay(folder: Path, seconds: float, quick: bool) -> dict[int, list[Goodput]]:
    """Replay all traces at the same time and return their accounts by number of GPUs."""
    jobs: list[tuple[int, Path, subprocess.Popen[bytes]]] = []
    for gpus in (16384,) if quick else (1024, 16384):
        every_s = best(GPUS_MTBF_H[gpus] * HOUR_S, Copies(stall_s=STALL_S)).every_s
        for seed in range(1 if quick else SEEDS):
            run_dir = folder / f"{gpus}-{seed}"
            (run_dir / "checkpoints").mkdir(parents=True)
            (run_dir / "rank.py").write_text(RANK)
            plan = trace(gpus, seconds, every_s, seed)
            (run_dir / "plan.json").write_text(json.dumps(plan))
            command = [sys.executable, __file__, "--supervise", str(run_dir)]
            with (run_dir / "output").open("w") as output:
                job = subprocess.Popen(command, stdout=output, stderr=output, env=environment())
            jobs.append((gpus, run_dir, job))
    found: dict[int, list[Goodput]] = {}
    for gpus, run_dir, job in jobs:
        if job.wait(timeout=20 * seconds + 120):
            raise RuntimeError(f"the job stopped: {(run_dir / 'output').read_text()[-2000:]}")
        found.setdefault(gpus, []).append(account(read_events(run_dir)))
    return found


def environment() -> dict[str, str]:
    """Return the variables of child processes: this package first."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }


def total(accounts: list[Goodput], *uses: Use) -> float:
    """Return the seconds of some uses over several accounts."""
    return sum(found.seconds[use] for found in accounts for use in uses)


def compare(accounts: list[Goodput]) -> dict[str, float]:
    """Return what was measured in one kind of trace and what the model says to it.

    The wall-clock begins when training first does: the first start is no failure's.
    """
    failed = sum(len(found.failures) for found in accounts)
    loop_s = sum(s.end - s.begin for found in accounts for s in found.spans if s.step >= 0)
    loop_s += total(accounts, Use.lost) - sum(
        span.uses.get(Use.lost, 0.0) for found in accounts for span in found.spans if span.step >= 0
    )
    first_s = sum(
        span.end - span.begin
        for found in accounts
        for span in found.spans
        if span.attempt == 0 and span.uses.keys() == {Use.start}
    )
    wall_s = sum(found.wall_s for found in accounts) - first_s
    down_s = total(accounts, Use.detection, Use.restart, Use.idle, Use.start, Use.restore) - first_s
    saves = sum(
        1 for found in accounts for s in found.spans if s.uses.get(Use.save, 0.0) > STALL_S / 2
    )
    stalls_s = total(accounts, Use.save)
    assert saves, "no save was accounted"
    copies = Copies(stall_s=stalls_s / saves, every_s=(loop_s - stalls_s) / max(saves, 1))
    measured = total(accounts, Use.useful) / wall_s
    predicted = kept_share(loop_s / failed, copies, down_s / failed)
    deaths = [f for found in accounts for f in found.failures if f.fault != "hang"]
    hangs = [f for found in accounts for f in found.failures if f.fault == "hang"]
    return {
        "failures": failed,
        "measured": measured,
        "predicted": predicted,
        "error": abs(measured - predicted),
        "mtbf_s": loop_s / failed,
        "down_s": down_s / failed,
        "detection_s": sum(f.detection_s for f in deaths) / max(len(deaths), 1),
        "hang_detection_s": sum(f.detection_s for f in hangs) / max(len(hangs), 1),
        "every_s": copies.every_s,
        "stall_s": copies.stall_s,
        "unknown_share": total(accounts, Use.unknown) / wall_s,
    }


def real_restart(folder: Path) -> dict[str, float]:
    """Kill a rank of a real run of two and return how long it took to notice and to go on."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny_run import make_data, overrides

    run = folder / "run"
    arguments = overrides(
        make_data(folder / "data"), run, "stage.steps=24", "resilience.snapshot_every=1",
        "resilience.faults=[sigkill@1:12]", "launch.ranks_per_node=2", "certify.at_start=false",
    )  # fmt: skip
    command = [sys.executable, "-m", "hunyuan_train", "launch", "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    found = account(read_events(run))
    if done.returncode or len(found.failures) != 1:
        raise RuntimeError(
            f"the real run did not come back from one failure:\n{done.stderr[-2000:]}"
        )
    failed = found.failures[0]
    assert failed.recovery_s is not None, "it went on"
    step_s = found.seconds[Use.useful] / found.steps
    return {
        "detection_s": failed.detection_s,
        "restart_s": failed.recovery_s + step_s,
        "restore_s": found.seconds[Use.restore],
        "lost_steps": found.lost_steps,
    }


def checkpoint_stall(path: str, quick: bool) -> tuple[float, float]:
    """Return stall and gigabytes per rank from the checkpoint benchmark's JSON, or run it small."""
    if path:
        text = Path(path).read_text()
    else:
        size = ["--quick"] if quick else ["--parts", "4", "--every", "5", "--rounds", "2"]
        command = [sys.executable, str(ROOT / "benchmarks" / "checkpoint.py"), *size]
        text = subprocess.run(
            command, capture_output=True, text=True, env=environment(), check=True
        ).stdout
    figures = json.loads(text.strip().splitlines()[-1])["figures"]
    return figures["stall_s"]["value"], figures["gigabytes_per_rank"]["value"]


def figure(value: float, target: str = "", holds: bool = True) -> dict[str, Any]:
    """Return one figure in the standard form."""
    return {"value": value, "target": target, "holds": holds} if target else {"value": value}


def projected(stall_s: float, detection_s: float, restart_s: float) -> dict[str, Any]:
    """Return the shares at full size, and how long a failure may last for the target."""
    figures: dict[str, Any] = {}
    for gpus in (1024, 16384):
        mtbf_s = GPUS_MTBF_H[gpus] * 3600
        copies = best(mtbf_s, Copies(stall_s=stall_s))
        share = kept_share(mtbf_s, copies, detection_s + restart_s)
        wanted = gpus == 1024
        figures[f"projected_share_{gpus}_gpus"] = (
            figure(share, f">= {SHARE_TARGET}", share >= SHARE_TARGET) if wanted else figure(share)
        )
        figures[f"projected_interval_{gpus}_gpus_s"] = figure(copies.every_s)
        up_s = mtbf_s * kept_share(mtbf_s, copies, 0.0)
        figures[f"failure_may_last_{gpus}_gpus_s"] = figure(up_s / SHARE_TARGET - mtbf_s)
    return figures


def main() -> None:
    """Measure, compare, project; print one JSON object last."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--seconds", type=float, default=45.0, help="of each replayed trace")
    parser.add_argument("--checkpoint-json", default="", help="output of benchmarks/checkpoint.py")
    parser.add_argument("--restart-s", type=float, help="instead of the real run")
    parser.add_argument("--allowance-s", type=float, default=15.0, help="what this machine lacks")
    parser.add_argument("--hang-s", type=float, default=60.0, help="of the watchdog, at full size")
    parser.add_argument("--supervise", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="one short trace, no real run")
    options = parser.parse_args()
    if options.supervise:
        sys.exit(supervise(options.supervise))
    if options.quick:
        options.seconds, options.restart_s = 1.0, options.restart_s or 3.0
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for gpus, accounts in replay(
            Path(scratch) / "traces", options.seconds, options.quick
        ).items():
            found = compare(accounts)
            for name, value in found.items():
                figures[f"replay_{gpus}_{name}"] = figure(value)
            error = found["error"]
            figures[f"replay_{gpus}_error"] = figure(
                error, f"<= {ERROR_TARGET}", error <= ERROR_TARGET
            )
        stall_s, gigabytes = checkpoint_stall(options.checkpoint_json, options.quick)
        restart = {"detection_s": 0.0, "restart_s": options.restart_s}
        if options.restart_s is None:
            restart = real_restart(Path(scratch))
    hangs = CAUSES["loop"] / sum(CAUSES.values())
    detection_s = (1 - hangs) * restart["detection_s"] + hangs * options.hang_s
    figures["stall_s"] = figure(stall_s, "<= 0.2", stall_s <= 0.2)
    figures["stall_gigabytes_per_rank"] = figure(gigabytes)
    figures |= {f"real_run_{name}": figure(value) for name, value in restart.items()}
    figures["assumed_allowance_s"] = figure(options.allowance_s)
    figures["assumed_hang_s"] = figure(options.hang_s)
    figures["mean_detection_s"] = figure(detection_s)
    figures |= projected(stall_s, detection_s, restart["restart_s"] + options.allowance_s)
    machine = {
        "device": platform.machine(),
        "cores": os.cpu_count(),
        "load_at_the_end": os.getloadavg()[0],
    }
    print(json.dumps({"benchmark": "goodput", "machine": machine, "figures": figures}))


if __name__ == "__main__":
    main()

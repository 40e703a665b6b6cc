"""``doctor``: this machine and the others, checked before a run. Free of torch."""

import json
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hunyuan_train.config.root import RunConfig
from hunyuan_train.engine.launching import check_machine, job_of
from hunyuan_train.resilience.board import Member
from hunyuan_train.resilience.health import (
    SKEW_S,
    SLOW_FACTOR,
    Health,
    compare,
    table,
)
from hunyuan_train.resilience.supervisor import Launch, Supervisor

MIN_ALLREDUCE_MIB_S = 10.0
"""Least bandwidth of an all-reduce over all ranks; any network that can train is far above it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkup:
    """What was found out, by node number."""

    healths: list[Health]
    measured: list[dict[str, float]] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def text(self) -> str:
        """Return the table, what was measured together, and a sentence for each failed check."""
        lines = [table(self.healths)]
        if self.measured:
            slowest = min(row["allreduce_mib_s"] for row in self.measured)
            products = " ".join(f"{row['matmul_gflops']:.0f}" for row in self.measured)
            lines.append(f"matmul of each rank  {products} GFLOP/s")
            if len(self.measured) > 1:
                lines.append(f"all-reduce, {len(self.measured)} ranks  {slowest:.0f} MiB/s")
        lines += [f"FAILED {complaint}" for complaint in self.complaints]
        return "\n".join(lines if self.complaints else [*lines, "all checks hold"])


def check_cluster(cfg: RunConfig) -> Checkup:
    """Check the machines of ``cfg.launch``; every one of them runs this at the same time.

    It is a small job of its own in ``run.dir/doctor``, started by the launcher as any other.
    """
    run_dir = Path(cfg.run.dir)
    folder = run_dir / "doctor"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "measured.json"
    target.unlink(missing_ok=True)
    health = check_machine(cfg)
    told = replace(health, complaints=[])  # a sick machine takes part, to be compared
    supervisor = Supervisor(
        Launch(
            cfg=replace(cfg.launch, max_restarts=0, spares=0),
            resilience=cfg.resilience,
            job=job_of(cfg),
            run_dir=folder,
            argv=("-m", "hunyuan_train.resilience.probe", str(target.resolve())),
            preload=("torch", "hunyuan_train.runtime.dist"),
            preflight=lambda: told,
        )
    )
    code = supervisor.run()
    members = supervisor.planned
    healths = [Health.from_dict(member.health) for member in members.values()] or [health]
    complaints = [f"{health.host}: {complaint}" for complaint in health.complaints]
    complaints += [f"{members[t].host}: {why}" for t, why in compare(members).items()]
    complaints += skewed(members, supervisor.skew_s)
    measured = json.loads(target.read_text()) if target.is_file() else []
    if code or not measured:
        complaints.append(
            f"the ranks could not talk to each other (exit code {code}); "
            f"their output is in {folder / 'logs'}"
        )
    return Checkup(healths=healths, measured=measured, complaints=complaints + too_slow(measured))


def skewed(members: dict[int, Member], skew_s: dict[int, float]) -> list[str]:
    """Return a sentence for each machine whose clock differs from this one's."""
    return [
        f"{members[ticket].host}: its clock differs from this machine's by {abs(ahead):.1f} s, "
        f"more than {SKEW_S:.0f} s; start a time service"
        for ticket, ahead in skew_s.items()
        if ticket in members and abs(ahead) > SKEW_S
    ]


def too_slow(measured: list[dict[str, Any]]) -> list[str]:
    """Return a sentence for each rank slower than the median, and for a slow network."""
    complaints = []
    middle = statistics.median(row["matmul_gflops"] for row in measured) if measured else 0.0
    for rank, row in enumerate(measured):
        if len(measured) > 2 and row["matmul_gflops"] < SLOW_FACTOR * middle:
            complaints.append(
                f"node {row['node']:.0f}: rank {rank} multiplies matrices at "
                f"{row['matmul_gflops']:.0f} GFLOP/s, the median rank at {middle:.0f}"
            )
    if len(measured) > 1:
        slowest = min(row["allreduce_mib_s"] for row in measured)
        if slowest < MIN_ALLREDUCE_MIB_S:
            complaints.append(
                f"an all-reduce over all ranks runs at {slowest:.1f} MiB/s, at least "
                f"{MIN_ALLREDUCE_MIB_S:.0f} is needed; check which network interface is used"
            )
    return complaints

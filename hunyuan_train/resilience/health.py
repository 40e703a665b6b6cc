"""Checks of a machine before it takes part in a run, and of machines against each other.

Free of torch. :func:`preflight` takes well under three seconds and is what ``launch`` runs;
``hunyuan-train doctor`` adds what needs torch and the network (:mod:`.probe`).
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hunyuan_train.resilience.board import Member

PACKAGES = (
    "torch", "numpy", "triton", "deepspeed", "megatron-core", "flash-attn", "safetensors", "av",
)  # fmt: skip
"""Packages that must be the same on all machines, where they are installed."""

MIN_DISK_GIB = 10.0
MIN_WRITE_MIB_S = 20.0
MIN_SHM_GIB = 1.0
MIN_HOST_FREE = 0.05
"""Share of the host's memory that must be free."""
MIN_GPU_FREE = 0.9
"""Share of a GPU's memory that must be free: less means that another process is on it."""
SLOW_FACTOR = 0.5
"""A machine whose matrix products run below this share of the median is called slow."""
SKEW_S = 2.0
"""Difference of the clocks of two machines above which their logs cannot be read together. Nothing
in the launcher depends on it. The measurement itself is good to about the interval between two
looks at the other's record, a second."""

_WRITE_BYTES = 16 << 20
_GPU_FIELDS = (
    "name", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total", "clocks_throttle_reasons.hw_slowdown",
)  # fmt: skip
_GIB = 1 << 30


@dataclass(kw_only=True, slots=True)
class Health:
    """What was found out about one machine; numbers that were not measured are 0."""

    host: str = ""
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    host_gib: float = 0.0
    host_free_gib: float = 0.0
    shm_gib: float = 0.0
    disk_free_gib: float = 0.0
    write_mib_s: float = 0.0
    matmul_gflops: float = 0.0
    seconds: float = 0.0
    """What the checks took."""
    complaints: list[str] = field(default_factory=list)
    """One sentence for each failed check."""

    def text(self) -> str:
        """Return the complaints as one line, empty if there are none."""
        return "; ".join(self.complaints)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Health":
        """Undo :meth:`to_dict`; fields of another version are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})


def preflight(run_dir: Path, ranks: int = 0, device: str = "auto") -> Health:
    """Check this machine: versions, memory, GPUs, disk and speed.

    Args:
        run_dir: Folder of the run; its disk is the one that counts.
        ranks: Processes it has to run, each of which needs a GPU if this machine has any.
        device: ``run.device``; cpu needs no GPU, cuda does.
    """
    started = time.monotonic()
    health = Health(
        host=platform.node(), python=platform.python_version(), versions=package_versions()
    )
    checks: tuple[Callable[[Health, Path], Iterable[str]], ...] = (
        check_packages, check_memory, check_gpus, check_disk, check_speed,
    )  # fmt: skip
    for check in checks:
        try:
            health.complaints += check(health, run_dir)
        except OSError as error:
            health.complaints.append(f"{check.__name__.replace('_', ' ')}: {error}")
    found = len(health.gpus)
    if device != "cpu" and found < ranks and (found or device == "cuda"):
        health.complaints.append(f"nvidia-smi lists {found} GPUs, and {ranks} ranks need one each")
    health.seconds = time.monotonic() - started
    return health


def package_versions() -> dict[str, str]:
    """Return the versions of those of :data:`PACKAGES` that are installed."""
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def check_packages(health: Health, run_dir: Path) -> Iterable[str]:
    """Torch must be there, and a package called apex must be NVIDIA's."""
    if "torch" not in health.versions:
        yield "torch is not installed; install hunyuan_train again"
    with suppress(importlib.metadata.PackageNotFoundError):
        apex = importlib.metadata.distribution("apex")
        names = {str(path).split("/")[0] for path in apex.files or ()}
        told = f"{apex.metadata['Summary'] or ''} {apex.metadata['Home-page'] or ''}".lower()
        if "pyramid" in told or "velruse" in told or "amp_C" not in " ".join(names):
            yield (
                f"the package apex {apex.version} is not NVIDIA's but the one of that name on "
                "PyPI; remove it with `pip uninstall apex`, and build NVIDIA's from its source"
            )


def check_memory(health: Health, run_dir: Path) -> Iterable[str]:
    """The host needs free memory, and /dev/shm room for what processes pass each other."""
    values = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
    health.host_gib = int(values["MemTotal"]) * 1024 / _GIB
    health.host_free_gib = int(values["MemAvailable"]) * 1024 / _GIB
    if health.host_free_gib < MIN_HOST_FREE * health.host_gib:
        yield (
            f"only {health.host_free_gib:.1f} of {health.host_gib:.0f} GiB of memory are free; "
            "end what uses it"
        )
    shm = os.statvfs("/dev/shm")
    health.shm_gib = shm.f_blocks * shm.f_frsize / _GIB
    if health.shm_gib < MIN_SHM_GIB:
        yield (
            f"/dev/shm has {health.shm_gib:.2f} GiB, at least {MIN_SHM_GIB:.0f} is needed; "
            "start the container with a larger --shm-size"
        )


def check_gpus(health: Health, run_dir: Path) -> Iterable[str]:
    """GPUs, where there are any, must be free, at their clocks and without ECC errors."""
    if not (program := shutil.which("nvidia-smi")):
        return
    command = [program, f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        yield "nvidia-smi does not answer within 20 s; the driver or a GPU hangs"
        return
    if done.returncode:
        if "No devices" not in done.stdout + done.stderr:
            yield f"nvidia-smi fails: {(done.stdout + done.stderr).strip().splitlines()[:1]}"
        return
    health.gpus = parse_gpus(done.stdout)
    yield from gpu_complaints(health.gpus)


def parse_gpus(text: str) -> list[dict[str, Any]]:
    """Turn the rows of nvidia-smi into one dictionary per GPU; what it does not know is None."""
    rows = []
    for line in filter(str.strip, text.splitlines()):
        values = [value.strip() for value in line.split(",")]
        row: dict[str, Any] = {}
        for name, value in zip(_GPU_FIELDS, values, strict=False):
            number = re.fullmatch(r"-?\d+(\.\d+)?", value)
            unknown = value.startswith("[") or value == "N/A"
            row[name] = float(value) if number else None if unknown else value
        rows.append(row)
    return rows


def gpu_complaints(gpus: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Return a sentence for each GPU that is in use, slowed down or has lost data."""
    for index, gpu in enumerate(gpus):
        total, used = gpu.get("memory.total"), gpu.get("memory.used")
        if total and used is not None and used > (1 - MIN_GPU_FREE) * total:
            yield f"GPU {index} has {used:.0f} of {total:.0f} MiB in use; end that process"
        if errors := gpu.get("ecc.errors.uncorrected.volatile.total"):
            yield f"GPU {index} has {errors:.0f} uncorrected ECC errors; reset or replace it"
        if gpu.get("clocks_throttle_reasons.hw_slowdown") == "Active":
            yield f"GPU {index} is slowed down by its hardware (power or heat); check its cooling"


def check_disk(health: Health, run_dir: Path) -> Iterable[str]:
    """The disk of the run needs room and speed for checkpoints."""
    run_dir.mkdir(parents=True, exist_ok=True)
    health.disk_free_gib = shutil.disk_usage(run_dir).free / _GIB
    if health.disk_free_gib < MIN_DISK_GIB:
        yield (
            f"run.dir={run_dir} has {health.disk_free_gib:.1f} GiB free, at least "
            f"{MIN_DISK_GIB:.0f} is needed; free some or choose another folder"
        )
    probe = run_dir / f".write-{platform.node()}-{os.getpid()}"
    data = os.urandom(1 << 20)
    started = time.monotonic()
    try:
        with probe.open("wb") as file:
            for _ in range(_WRITE_BYTES >> 20):
                file.write(data)
                if time.monotonic() - started > 1.0:
                    break
            written = file.tell()
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)
    health.write_mib_s = written / (1 << 20) / (time.monotonic() - started)
    if health.write_mib_s < MIN_WRITE_MIB_S:
        yield (
            f"run.dir={run_dir} is written at {health.write_mib_s:.1f} MiB/s, at least "
            f"{MIN_WRITE_MIB_S:.0f} is needed; choose a faster disk"
        )


def check_speed(health: Health, run_dir: Path) -> Iterable[str]:
    """Measure matrix products on the CPU, for the comparison with the other machines."""
    import numpy as np

    size = 384
    left = np.ones((size, size), np.float32)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        _ = left @ left
        best = min(best, time.perf_counter() - started)
    health.matmul_gflops = 2 * size**3 / best / 1e9
    return ()


def compare(members: Mapping[int, Member]) -> dict[int, str]:
    """Return, by ticket, what is wrong with a machine compared with the others.

    The versions and the GPUs of most machines are right; speed is compared with the median of at
    least three machines, because of two nobody knows which one is slow.
    """
    healths = {
        ticket: Health.from_dict(member.health)
        for ticket, member in members.items()
        if member.health
    }
    wrong: dict[int, list[str]] = {ticket: [] for ticket in healths}
    if len(healths) > 1:
        for name in sorted({name for health in healths.values() for name in _facts(health)}):
            found = {ticket: _facts(health).get(name, "none") for ticket, health in healths.items()}
            usual = statistics.mode(found[ticket] for ticket in sorted(found))
            for ticket, value in found.items():
                if value != usual:
                    wrong[ticket].append(f"{name} is {value} here and {usual} on the others")
    if len(healths) > 2:
        middle = statistics.median(health.matmul_gflops for health in healths.values())
        for ticket, health in healths.items():
            if health.matmul_gflops < SLOW_FACTOR * middle:
                wrong[ticket].append(
                    f"matrix products run at {health.matmul_gflops:.1f} GFLOP/s, the median "
                    f"machine makes {middle:.1f}"
                )
    return {ticket: "; ".join(sentences) for ticket, sentences in wrong.items() if sentences}


def _facts(health: Health) -> dict[str, str]:
    """Return what has to be the same on all machines."""
    gpus = [str(gpu.get("name")) for gpu in health.gpus]
    return {
        "Python": health.python,
        **health.versions,
        "the set of GPUs": json.dumps(sorted(gpus)) if gpus else "none",
    }


def table(healths: Iterable[Health]) -> str:
    """Return the findings as aligned text, one column per machine."""
    columns = list(healths)
    rows: list[tuple[str, list[str]]] = [
        ("", [health.host for health in columns]),
        ("python", [health.python for health in columns]),
    ]
    for name in PACKAGES:
        if any(name in health.versions for health in columns):
            rows.append((name, [health.versions.get(name, "-") for health in columns]))
    rows += [
        ("GPUs", [_gpu_text(health.gpus) for health in columns]),
        ("memory free", [f"{h.host_free_gib:.1f} of {h.host_gib:.0f} GiB" for h in columns]),
        ("/dev/shm", [f"{h.shm_gib:.1f} GiB" for h in columns]),
        ("disk free", [f"{h.disk_free_gib:.0f} GiB" for h in columns]),
        ("disk write", [f"{h.write_mib_s:.0f} MiB/s" for h in columns]),
        ("matmul, CPU", [f"{h.matmul_gflops:.0f} GFLOP/s" for h in columns]),
        ("took", [f"{h.seconds:.1f} s" for h in columns]),
    ]
    first = max(len(name) for name, _ in rows)
    widths = [max(len(row[i]) for _, row in rows) for i in range(len(columns))]
    lines = [
        f"{name:<{first}}  "
        + "  ".join(f"{text:>{width}}" for text, width in zip(row, widths, strict=True))
        for name, row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _gpu_text(gpus: list[dict[str, Any]]) -> str:
    return f"{len(gpus)} x {gpus[0].get('name')}" if gpus else "none"

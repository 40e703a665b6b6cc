"""The only reader of the process environment."""

import os
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchEnv:
    """What torchrun or Slurm told this process about itself."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    """Ranks on this node."""
    restart_count: int
    """Attempts before this one that may have left keys in the store of the process group."""
    launched: bool
    """Whether a launcher set the rank variables, so a process group must be formed."""


def read_launch_env() -> LaunchEnv:
    """Read the rank variables that torchrun sets; without them this is one process of one."""
    # A store of its own for each attempt holds no old keys; and torchrun's agents, who count by
    # themselves, would not agree on a number once one of them has come later than the others.
    own_store = os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"
    return LaunchEnv(
        rank=int(os.environ.get("RANK", "0")),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        world_size=int(os.environ.get("WORLD_SIZE", "1")),
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        restart_count=0 if own_store else int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        launched="RANK" in os.environ and "MASTER_ADDR" in os.environ,
    )


def read_attempt() -> int:
    """Return the number of this start of all ranks, 0 for the first.

    ``hunyuan-train launch`` sets HUNYUAN_ATTEMPT, alike on all nodes; torchrun counts per node.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return int(os.environ.get("HUNYUAN_ATTEMPT", restarts))


def read_node() -> int:
    """Return the number of this node among those that train, 0 without a launcher."""
    return int(os.environ.get("GROUP_RANK", "0"))


def read_array_task() -> tuple[int, int]:
    """Return this task's place in its Slurm job array and the number of tasks; (0, 1) without.

    The task numbers of ``--array`` may begin anywhere and have steps; where they have gaps, two
    tasks may have the same place.
    """
    count = int(os.environ.get("SLURM_ARRAY_TASK_COUNT", "1"))
    if count < 2:
        return 0, 1
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX")
    number, lowest, highest = (int(os.environ.get(name, "0")) for name in names)
    if highest <= lowest:
        return number % count, count
    return (number - lowest) * (count - 1) // (highest - lowest), count


def read_job_folder() -> str:
    """Return the folder in which the launcher looks for heartbeats and events; "" without one.

    It is the ``run.dir`` of the command, of which a curriculum's stages are subfolders.
    """
    return os.environ.get("HUNYUAN_JOB_FOLDER", "")


def child_environment(**changes: str) -> dict[str, str]:
    """Return this process's environment with ``changes``, for a child process."""
    return {**os.environ, **changes}


def set_default(name: str, value: str) -> None:
    """Set a variable that a library reads, unless it is set already."""
    os.environ.setdefault(name, value)

"""Which layout a run takes on when it has fewer ranks than its config was written for.

Free of torch: the processes above the ranks import it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from hunyuan_train.parallel.config import ParallelConfig

AXES = ("tp", "cp_ring", "cp_ulysses", "dp_replicate")
ACCEPT = "run.accept_changes=true"
"""Lets a run go on with other micro-steps per rank: its config may not change otherwise."""

_FIELDS = (*AXES, "sp", "zero_stage")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What choosing a layout needs to know of a run's config."""

    parallel: ParallelConfig
    world_size: int
    """Ranks the config was written for."""
    micro_steps: int = 1
    """Micro-batches per rank and update."""
    fixed_update: bool = False
    """Whether the config gives the size of an update over all ranks, whatever their number."""
    num_heads: int = 0
    """Attention heads, which tp and cp_ulysses share out; 0 checks nothing."""


def choose(job: Job, ranks: int, allowed: Sequence[str] = ()) -> list[str] | None:
    """Return the overrides with which ``job`` runs on ``ranks`` ranks, or None if nothing fits.

    The config's own layout, data-parallel ranks left out, comes first unless ``allowed`` names
    others; those are tried in their order. An update keeps its samples: where the config counts
    them per rank, the micro-batches per rank grow as the data-parallel ranks become fewer.

    Args:
        job: The run.
        ranks: Ranks there are.
        allowed: Layouts such as ``tp=2,cp_ring=2``; an axis that is not named is 1.

    Raises:
        ValueError: an entry of ``allowed`` is not a layout.
    """
    if ranks == job.world_size:
        return []
    layouts = [parse(text, job.parallel) for text in allowed] or _with_fewer_replicas(job.parallel)
    for layout in layouts:
        fixed = prod(getattr(layout, axis) for axis in AXES)
        if ranks % fixed or not heads_fit(job, layout):
            continue
        overrides = _difference(job.parallel, layout)
        micro_steps = _micro_steps(job, layout, ranks)
        if micro_steps is None:
            continue
        if micro_steps != job.micro_steps:
            overrides += [f"stage.micro_steps={micro_steps}", ACCEPT]
        return overrides
    return None


def parse(text: str, base: ParallelConfig) -> ParallelConfig:
    """Return the layout that an entry of ``launch.layouts`` describes.

    Raises:
        ValueError: naming the entry and what is wrong with it.
    """
    values: dict[str, int | bool] = dict.fromkeys(AXES, 1)
    for part in filter(None, text.replace(" ", "").split(",")):
        name, _, value = part.partition("=")
        name = name.removeprefix("parallel.")
        if name not in _FIELDS:
            raise ValueError(
                f"launch.layouts has {text!r}: {name} is no part of a layout; "
                f"choose from {' '.join(_FIELDS)}"
            )
        if name == "sp":
            values[name] = value == "true"
        elif value.isdigit():
            values[name] = int(value)
        else:
            raise ValueError(f"launch.layouts has {text!r}: {part} must be {name}=NUMBER")
    values.setdefault("sp", base.sp and values["tp"] > 1)
    try:
        return replace(base, **values)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValueError(f"launch.layouts has {text!r}: {error}") from error


def heads_fit(job: Job, layout: ParallelConfig) -> bool:
    """Return whether tensor parallelism and Ulysses can share out the attention heads."""
    return job.num_heads % (layout.tp * layout.cp_ulysses) == 0


def _with_fewer_replicas(base: ParallelConfig) -> list[ParallelConfig]:
    """Return the layout as it is, then with fewer and fewer replicas."""
    counts = [n for n in range(base.dp_replicate, 0, -1) if base.dp_replicate % n == 0]
    return [replace(base, dp_replicate=n) for n in counts]


def _micro_steps(job: Job, layout: ParallelConfig, ranks: int) -> int | None:
    """Return the micro-batches per rank that keep an update's size, None if no number does."""
    if job.fixed_update:
        return job.micro_steps
    before = job.world_size // (job.parallel.tp * job.parallel.cp)
    now = ranks // (layout.tp * layout.cp)
    total = before * job.micro_steps
    return total // now if total % now == 0 else None


def _difference(base: ParallelConfig, layout: ParallelConfig) -> list[str]:
    changed = [name for name in _FIELDS if getattr(base, name) != getattr(layout, name)]
    return [f"parallel.{name}={str(getattr(layout, name)).lower()}" for name in changed]

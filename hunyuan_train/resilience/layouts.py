"""Which layout a run takes on when it has fewer ranks than its config was written for.

Free of torch: the processes above the ranks import it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from hunyuan_train.parallel.config import ParallelConfig

AXES = ("tp", "cp_ring", "cp_ulysses", "dp_replicate")

_FIELDS = (*AXES, "sp", "zero_stage")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What choosing a layout needs to know of a run's config."""

    parallel: ParallelConfig
    world_size: int
    """Ranks the config was written for."""
    planned_ranks: int = 0
    """``data.planned_ranks`` of the config; 0 leaves them to the first start."""
    num_heads: int = 0
    """Attention heads, which tp and cp_ulysses share out; 0 checks nothing."""


def choose(job: Job, ranks: int, allowed: Sequence[str] = ()) -> list[str] | None:
    """Return the overrides with which ``job`` runs on ``ranks`` ranks, or None if nothing fits.

    The config's own layout, data-parallel ranks left out, comes first unless ``allowed`` names
    others; those are tried in their order. An update keeps its samples: it stays planned for the
    data-parallel ranks that the config was written for.

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
        if not job.planned_ranks:
            planned = job.world_size // (job.parallel.tp * job.parallel.cp)
            overrides.append(f"data.planned_ranks={planned}")
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


def _difference(base: ParallelConfig, layout: ParallelConfig) -> list[str]:
    changed = [name for name in _FIELDS if getattr(base, name) != getattr(layout, name)]
    return [f"parallel.{name}={str(getattr(layout, name)).lower()}" for name in changed]

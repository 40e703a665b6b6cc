"""``hunyuan-train plan``: what a run would do and what fits, told before it does it."""

from collections.abc import Sequence
from pathlib import Path

from hunyuan_train.cli.launching import composed
from hunyuan_train.engine import plan_report, planning
from hunyuan_train.engine.plan_verify import verify_plan
from hunyuan_train.engine.planning_run import plan_run
from hunyuan_train.engine.scaling import plan_budget

TOPICS = {
    "data": "buckets, shares, predicted balance and left-out files of the selection",
    "budget": "model size, tokens and GPU-days of a compute budget, by a scaling law",
    "verify": "measures one block of each kind here and compares it with the prediction",
}
_RANKS = "--ranks"


def main(argv: Sequence[str]) -> int:
    """Plan layouts for the overrides of a run, or the topic that comes before them."""
    if not argv or "=" in argv[0] or argv[0].startswith("-"):
        return _plan_layouts(argv)
    if argv[0] == "data":
        return _plan_data(argv[1:])
    if argv[0] == "budget":
        return _budget(argv[1:])
    if argv[0] == "verify":
        return _verify(argv[1:])
    topics = "; ".join(f"{name}: {text}" for name, text in TOPICS.items())
    raise ValueError(
        f"{argv[0]} cannot be planned; topics are {topics}; and without a topic the overrides of a "
        "run, like stage=... cluster=h100, plan its layout"
    )


def _plan_layouts(argv: Sequence[str]) -> int:
    cfg = composed(argv)
    if cfg is None:
        return 0
    plan = plan_run(cfg)
    folder = Path(cfg.run.dir)
    plan.write(folder)
    print(f"{plan}\n\n{folder / plan_report.CHART_NAME}\n{folder / plan_report.JSON_NAME}")
    return 0


def _verify(argv: Sequence[str]) -> int:
    cfg = composed(argv)
    if cfg is not None:
        print(verify_plan(cfg))
    return 0


def _budget(argv: Sequence[str]) -> int:
    """Divide ``scaling.budget``; ``C=1e7`` is short for it."""
    short = "C="
    fields = [f"scaling.budget={a.removeprefix(short)}" if a.startswith(short) else a for a in argv]
    cfg = composed(fields)
    if cfg is not None:
        print(plan_budget(cfg))
    return 0


def _plan_data(argv: Sequence[str]) -> int:
    """Plan the draws for ``--ranks N`` ranks with distinct data."""
    ranks, overrides = _ranks(argv)
    cfg = composed(overrides)
    if cfg is None:
        return 0
    plan = planning.plan_data(cfg, ranks)
    folder = Path(cfg.run.dir)
    plan.write(folder)
    print(f"{plan}\n\n{folder / planning.CHART_NAME}\n{folder / planning.JSON_NAME}")
    return 0


def _ranks(argv: Sequence[str]) -> tuple[int, list[str]]:
    """Return the value of ``--ranks``, 1 without it, and the other arguments."""
    rest = list(argv)
    for place, argument in enumerate(rest):
        name, _, value = argument.partition("=")
        if name != _RANKS:
            continue
        end = place + 1
        if "=" not in argument:
            value = rest[end] if end < len(rest) else ""
            end += 1
        if not value.isdecimal() or not int(value):
            raise ValueError(f"{_RANKS} {value or '(nothing)'}: write a number like {_RANKS} 8")
        del rest[place:end]
        return int(value), rest
    return 1, rest

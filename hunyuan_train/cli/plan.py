"""``hunyuan-train plan``: what a run would do, told before it does it."""

from collections.abc import Sequence
from pathlib import Path

from hunyuan_train.cli.launching import composed
from hunyuan_train.engine.planning import CHART_NAME, JSON_NAME, plan_data

TOPICS = {"data": "buckets, shares, predicted balance and left-out files of the selection"}
_RANKS = "--ranks"


def main(argv: Sequence[str]) -> int:
    """Plan the topic that comes first, with ``--ranks N`` and the overrides of a run after it."""
    if not argv or argv[0] not in TOPICS:
        topics = "; ".join(f"{name}: {text}" for name, text in TOPICS.items())
        what = f"{argv[0]} cannot be planned" if argv else "plan what"
        raise ValueError(f"{what}; topics are {topics}")
    ranks, overrides = _ranks(argv[1:])
    cfg = composed(overrides)
    if cfg is None:
        return 0
    plan = plan_data(cfg, ranks)
    folder = Path(cfg.run.dir)
    plan.write(folder)
    print(f"{plan}\n\n{folder / CHART_NAME}\n{folder / JSON_NAME}")
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

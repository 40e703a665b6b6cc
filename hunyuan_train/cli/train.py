"""``hunyuan-train train``: one stage."""

from collections.abc import Sequence

from hunyuan_train.cli.launching import composed, joined_world
from hunyuan_train.engine.loop import Outcome, train
from hunyuan_train.resilience.crashes import EXIT_PREEMPTED
from hunyuan_train.resilience.preemption import Preemption


def main(argv: Sequence[str]) -> int:
    """Train one stage; return 75 when a signal stopped it after saving."""
    cfg = composed(argv)
    if cfg is None:
        return 0
    with Preemption(cfg.resilience) as preemption, joined_world(cfg) as world:
        outcome = train(cfg, world, preemption)
    return EXIT_PREEMPTED if outcome is Outcome.PREEMPTED else 0

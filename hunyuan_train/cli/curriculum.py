"""``hunyuan-train curriculum``: stages one after the other."""

from collections.abc import Sequence

from hunyuan_train.cli.launching import composed, joined_world
from hunyuan_train.config.compose import compose_config
from hunyuan_train.engine.curriculum import run_curriculum, stage_overrides
from hunyuan_train.engine.loop import Outcome
from hunyuan_train.resilience.crashes import EXIT_PREEMPTED
from hunyuan_train.resilience.preemption import Preemption


def main(argv: Sequence[str]) -> int:
    """Run the curriculum; return 75 when a signal stopped it after saving."""
    cfg = composed(argv)
    if cfg is None:
        return 0
    stages = [
        compose_config([*argv, *stage_overrides(cfg, number)])
        for number in range(len(cfg.curriculum.stages))
    ]
    with Preemption(cfg.resilience) as preemption, joined_world(cfg) as world:
        outcome = run_curriculum(cfg, stages, world, preemption)
    return EXIT_PREEMPTED if outcome is Outcome.PREEMPTED else 0

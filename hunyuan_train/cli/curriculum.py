"""``hunyuan-train curriculum``: the stages of a graph, each after the one it needs."""

from collections.abc import Sequence
from pathlib import Path

from hunyuan_train.cli.options import SELECTION, split_options
from hunyuan_train.config.compose import compose_config

DRY_RUN, LIST = "--dry-run", "--list"


def main(argv: Sequence[str]) -> int:
    """Run the curriculum; return 75 when a signal stopped it after saving.

    ``--from NAME`` runs this stage and what comes after it, ``--until NAME`` this one and what it
    needs. ``--dry-run`` says what it would take, ``--list`` names each stage and the one before it.
    """
    options, overrides = split_options(argv, SELECTION, (DRY_RUN, LIST))
    first, last = (options.get(name, "") for name in SELECTION)
    if LIST in options:
        graph = compose_config(overrides).curriculum
        for name in graph.selection(first, last):
            print(name, graph.stages[name].after or "-")
        return 0
    # Imported here because a list need not wait for torch.
    from hunyuan_train.cli.launching import composed, joined_world
    from hunyuan_train.engine.curriculum import compose_stages, run_curriculum
    from hunyuan_train.engine.loop import Outcome
    from hunyuan_train.resilience.crashes import EXIT_PREEMPTED
    from hunyuan_train.resilience.preemption import Preemption

    cfg = composed(overrides)
    if cfg is None:
        return 0
    stages = compose_stages(overrides, cfg)
    if DRY_RUN in options:
        from hunyuan_train.engine.curriculum_plan import plan_curriculum

        plan = plan_curriculum(cfg, stages, cfg.curriculum.selection(first, last))
        print(f"{plan}\n\n{plan.write(Path(cfg.run.dir))}")
        return 0
    with Preemption(cfg.resilience) as preemption, joined_world(cfg) as world:
        outcome = run_curriculum(cfg, stages, world, preemption, first=first, last=last)
    return EXIT_PREEMPTED if outcome is Outcome.PREEMPTED else 0

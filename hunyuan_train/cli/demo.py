"""``hunyuan-train demo``: the whole job at tiny scale, from generated clips to a report."""

from collections.abc import Sequence

from hunyuan_train.cli.launching import composed
from hunyuan_train.engine.demo import run_demo
from hunyuan_train.observability.logging import setup_logging

RECIPE = "recipe="


def main(argv: Sequence[str]) -> int:
    """Run the demo in ``run.dir``; a second call goes on where the first one stopped.

    ``recipe=demo_full`` adds fine-tuning, image to video and distillation.
    """
    chosen = any(argument.startswith(RECIPE) for argument in argv)
    arguments = [*argv] if chosen else [f"{RECIPE}demo", *argv]
    cfg = composed(arguments)
    if cfg is None:
        return 0
    setup_logging(cfg.logging)
    print(run_demo(cfg, arguments))
    return 0

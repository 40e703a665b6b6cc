"""``hunyuan-train launch VERB``: the ranks of a verb, kept going on this machine and on others."""

import sys
from collections.abc import Sequence

from hunyuan_train.cli.options import SELECTION, split_options
from hunyuan_train.config.compose import compose_config
from hunyuan_train.engine.launching import launch_verb
from hunyuan_train.engine.ledger import stage_folder
from hunyuan_train.observability.logging import setup_logging

VERBS = ("train", "curriculum", "precompute", "certify")
USAGE = f"""\
usage: hunyuan-train launch VERB [group=name] [section.field=value] ...

verbs: {" ".join(VERBS)}
Run the same command on every machine; launch.nodes and launch.ranks_per_node say how many there
are. run.dir must be a folder that all of them see."""


def main(argv: Sequence[str]) -> int:
    """Keep a verb going; return 0 when it is done, 75 after a signal, 1 when it was given up.

    2 is an input that the verb cannot work with: no restart helps.

    Raises:
        ValueError: for a config that cannot work, in one line per problem.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    verb, arguments = argv[0], argv[1:]
    if verb not in VERBS:
        print(f"hunyuan-train launch: {verb} is not one of {' '.join(VERBS)}", file=sys.stderr)
        return 2
    options, overrides = split_options(arguments, SELECTION if verb == "curriculum" else ())
    cfg = compose_config(overrides)
    setup_logging(cfg.logging)
    chosen = cfg.curriculum.selection(*(options.get(name, "") for name in SELECTION))
    # One stage is a job of its own: others of the same curriculum may run beside it.
    alone = bool(options) and len(chosen) == 1
    folder = stage_folder(cfg, chosen[0]) if alone else None
    return launch_verb(verb, arguments, cfg, folder)

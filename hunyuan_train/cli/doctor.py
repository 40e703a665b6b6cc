"""``hunyuan-train doctor [TOPIC]``: is everything there that a run needs?"""

import sys
from collections.abc import Sequence

from hunyuan_train.config.compose import compose_config
from hunyuan_train.engine.checkup import check_cluster
from hunyuan_train.observability.logging import setup_logging

TOPICS = {
    "cluster": "this machine, and with launch.nodes above 1 the others: run it on all",
    "encoders": "folders and results of run.vae and text; write=true stores what to expect",
}
_WRITE = "write=true"


def main(argv: Sequence[str]) -> int:
    """Check a topic, by default the cluster; return 1 if a check fails."""
    topic, *rest = argv if argv and "=" not in argv[0] else ["cluster", *argv]
    if topic not in TOPICS:
        rows = "\n".join(f"  {name:<10} {text}" for name, text in TOPICS.items())
        print(
            f"usage: hunyuan-train doctor [TOPIC] [section.field=value] ...\n\ntopics:\n{rows}",
            file=sys.stderr,
        )
        return 0 if topic in ("-h", "--help", "help") else 2
    cfg = compose_config([argument for argument in rest if argument != _WRITE])
    setup_logging(cfg.logging)
    if topic == "encoders":
        # Imported here: the other topic is free of torch.
        from hunyuan_train.engine.encoder_checkup import check_encoders

        checkup = check_encoders(cfg, write=_WRITE in rest)
    else:
        checkup = check_cluster(cfg)
    print(checkup.text())
    return 1 if checkup.complaints else 0

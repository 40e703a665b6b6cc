"""The main program of an encoder that training starts beside itself; see ``local_encoders``."""

import logging
import os
import signal
import sys
import threading
from pathlib import Path

import torch

from hunyuan_train.config.compose import load_config
from hunyuan_train.data.service_board import LOCAL
from hunyuan_train.engine.serving import build_server
from hunyuan_train.observability.logging import setup_logging

log = logging.getLogger(__name__)


def main(config: str, device: str) -> int:
    """Encode on ``device`` until the process that started this one is gone."""
    # Ctrl-C and what a scheduler sends reach all processes of a job; training decides.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_training, daemon=True).start()
    cfg = load_config(Path(config))
    os.nice(cfg.data.service.nice)
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    setup_logging(cfg.logging, rank=1)
    place = torch.device(device)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    try:
        build_server(cfg, place, LOCAL).serve()
    except ValueError as error:
        log.error("encoder process on %s: %s", device, error)
        return 2
    return 0


def _end_with_training() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""``hunyuan-train serve``: an encoder process for training that runs elsewhere."""

import os
import signal
import socket
from collections.abc import Sequence

import torch

from hunyuan_train.cli.launching import composed
from hunyuan_train.engine.serving import build_server
from hunyuan_train.observability.logging import setup_logging
from hunyuan_train.runtime.device import resolve_device
from hunyuan_train.runtime.env import read_launch_env


def main(argv: Sequence[str]) -> int:
    """Encode for training with the same settings until SIGINT or SIGTERM.

    Any number may run; under torchrun or srun each takes the device of its local rank.
    """
    cfg = composed(argv)
    if cfg is None:
        return 0
    if cfg.run.threads:
        torch.set_num_threads(cfg.run.threads)
    env = read_launch_env()
    setup_logging(cfg.logging, env.rank, env.world_size)
    device = resolve_device(cfg.run.device, env.local_rank)
    os.nice(cfg.data.service.nice)
    server = build_server(cfg, device, cfg.data.service.host or socket.gethostname())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: server.stop())
    print(
        f"encoder {server.entry.id} serves on {server.entry.host}:{server.entry.port}", flush=True
    )
    server.serve()
    counts = server.counts
    print(f"{counts.encoded} samples encoded, {counts.hits} found finished, {counts.bad} bad")
    return 0

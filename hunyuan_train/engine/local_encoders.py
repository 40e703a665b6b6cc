"""Encoder processes that training starts beside itself, and starts again when they end."""

import atexit
import logging
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from hunyuan_train.config.compose import CONFIG_NAME, save_config
from hunyuan_train.config.root import RunConfig

log = logging.getLogger(__name__)

_POLL_S = 0.2
_END_S = 5.0
_LONGEST_REST_S = 60.0
_GOOD_S = 300.0
"""After so long, the wait before the next start is short again."""
MODULE = "hunyuan_train.engine.encoder_process"


@dataclass(slots=True)
class _Place:
    """One of the processes, and those that were in its place before."""

    device: str
    process: "subprocess.Popen[bytes] | None" = None
    started: float = 0.0
    starts: int = 0
    due: float = 0.0


class LocalEncoders:
    """Keeps ``data.service.processes`` encoders running until closed.

    They end with this process however it ends, since they read a pipe that ends with it.

    Args:
        cfg: The run.
        device: For those that ``data.service.devices`` names none for.
    """

    def __init__(self, cfg: RunConfig, device: str) -> None:
        self._folder = TemporaryDirectory(prefix="hunyuan-encoders-")
        self._config = Path(self._folder.name) / CONFIG_NAME
        save_config(cfg, self._config)
        devices = cfg.data.service.devices or [device]
        self._places = [
            _Place(devices[number % len(devices)]) for number in range(cfg.data.service.processes)
        ]
        self._stopped = threading.Event()
        for place in self._places:
            self._start(place)
        self._thread = threading.Thread(target=self._watch, name="encoders", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """End the processes and wait for them."""
        if self._stopped.is_set():
            return
        self._stopped.set()
        self._thread.join()
        atexit.unregister(self.close)
        processes = [place.process for place in self._places if place.process is not None]
        for process in processes:
            assert process.stdin is not None
            process.stdin.close()
        until = time.monotonic() + _END_S
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()

    def _watch(self) -> None:
        while not self._stopped.wait(_POLL_S):
            now = time.monotonic()
            for place in self._places:
                if place.process is not None and place.process.poll() is not None:
                    code, seconds = place.process.returncode, now - place.started
                    place.starts = 1 if seconds > _GOOD_S else place.starts
                    rest = min(_LONGEST_REST_S, 2.0 ** (place.starts - 1))
                    place.process, place.due = None, now + rest
                    log.warning(
                        "an encoder process on %s ended with exit code %d after %.0f s; it is "
                        "started again in %.0f s",
                        *(place.device, code, seconds, rest),
                    )
                if place.process is None and now >= place.due:
                    self._start(place)

    def _start(self, place: _Place) -> None:
        command = [sys.executable, "-m", MODULE, str(self._config), place.device]
        place.process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0)
        place.started = time.monotonic()
        place.starts += 1
        log.info("encoder process %d on %s started", place.process.pid, place.device)

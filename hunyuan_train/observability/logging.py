"""Standard logging with the rank in front; the first rank speaks, the others only warn."""

import logging
import sys

from hunyuan_train.observability.config import LoggingConfig

_ROOT = "hunyuan_train"


class _StderrHandler(logging.StreamHandler):  # pyright: ignore[reportMissingTypeArgument]
    """Writes to the present ``sys.stderr``, which a live progress bar replaces while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def setup_logging(cfg: LoggingConfig, rank: int = 0, world_size: int = 1) -> logging.Logger:
    """Configure the logger of the package and return it; calling it again replaces the set-up.

    Args:
        cfg: Gives the level of the first rank.
        rank: This process; ranks above 0 show warnings and errors only.
        world_size: With more than one rank each line starts with the rank.
    """
    logger = logging.getLogger(_ROOT)
    for handler in [h for h in logger.handlers if isinstance(h, _StderrHandler)]:
        logger.removeHandler(handler)
    handler = _StderrHandler()
    where = f"[rank {rank}] " if world_size > 1 else ""
    handler.setFormatter(
        logging.Formatter(f"%(asctime)s {where}%(levelname).1s %(message)s", datefmt="%H:%M:%S")
    )
    logger.addHandler(handler)
    logger.setLevel(cfg.level.value.upper() if rank == 0 else logging.WARNING)
    logger.propagate = False
    return logger

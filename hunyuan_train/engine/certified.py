"""The layouts that earlier attempts of a run have proved: a restart need not prove them again."""

import hashlib
import json
import logging
from pathlib import Path

import torch

from hunyuan_train.config.compose import config_dict
from hunyuan_train.config.root import RunConfig
from hunyuan_train.runtime.dist import World, gather_objects
from hunyuan_train.runtime.env import read_attempt, read_job_folder

FILE_NAME = "certified.json"

log = logging.getLogger(__name__)

_SOURCE = Path(__file__).resolve().parents[1]


def is_certified(cfg: RunConfig, world: World) -> bool:
    """Return whether this is a restart and an earlier attempt proved the same; all ranks call it.

    Rank 0 looks and all ranks do as it says: they may not see the same files yet.
    """
    known = world.rank == 0 and read_attempt() > 0 and proof_key(cfg, world) in _read(cfg)
    return gather_objects(known)[0]


def remember(cfg: RunConfig, world: World) -> None:
    """Note what was proved; rank 0 writes it."""
    if world.rank:
        return
    path = _path(cfg)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(sorted({*_read(cfg), proof_key(cfg, world)}), indent=1))
    temporary.replace(path)


def proof_key(cfg: RunConfig, world: World) -> str:
    """Return a hash of all that a proof depends on: layout, world, model, torch, and this code."""
    parts = [
        config_dict(cfg.parallel), config_dict(cfg.model), config_dict(cfg.certify), world.size,
        world.device.type, torch.__version__,
        sorted((str(p), p.stat().st_mtime_ns) for p in _SOURCE.rglob("*.py")),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _path(cfg: RunConfig) -> Path:
    return Path(read_job_folder() or cfg.run.dir) / FILE_NAME


def _read(cfg: RunConfig) -> list[str]:
    path = _path(cfg)
    if not path.is_file():
        return []
    try:
        keys = json.loads(path.read_bytes())
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise ValueError("it is not a list of hashes")
    except (OSError, ValueError) as error:
        log.warning("%s cannot be used, so layouts are proved again: %s", path, error)
        return []
    return keys

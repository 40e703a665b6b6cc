"""Local copies of the indexes of remote stores, made once per machine and checked by digest."""

import fcntl
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

import xxhash

from hunyuan_train.data.blobs import Blobs, read_whole
from hunyuan_train.data.index import FILES, FIX, HEADER, Index, digest_of_header

logger = logging.getLogger(__name__)

_RANGE = 32 << 20


def cache_folder(setting: str) -> Path:
    """Return the folder of local copies: the setting, or one per user in the temporary folder."""
    return Path(setting or Path(tempfile.gettempdir()) / f"hunyuan-train-{os.getuid()}")


def copy_index(blobs: Blobs, name: str, folder: Path) -> Path:
    """Return a complete local copy of the index ``name`` in ``folder``, making it if need be.

    The processes of a machine may call this at once; one of them copies.

    Raises:
        ValueError: The index is missing, cannot be read, or is not what its digests say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / name
    with (folder / f".{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            Index.open(target)
            return target
        except ValueError:  # not there yet, or damaged
            shutil.rmtree(target, ignore_errors=True)
        temporary = folder / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)  # a killed process may have left it
        temporary.mkdir()
        try:
            _copy(blobs, name, temporary)
            temporary.rename(target)
        except OSError as error:
            raise ValueError(f"{blobs.where(name)} cannot be copied: {error}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def _copy(blobs: Blobs, name: str, target: Path) -> None:
    header = f"{name}/{HEADER}"
    text = read_whole(blobs, header).decode(errors="replace")
    if digest_of_header(text) != name:
        raise ValueError(f"{blobs.where(header)} is damaged; {FIX}")
    files = json.loads(text)["files"]
    logger.info("copying the index %s to %s", blobs.where(name), target.parent)
    for file in FILES:
        digest = xxhash.xxh3_128()
        nbytes = files[file]["nbytes"]
        with (target / file).open("wb") as out:
            for start in range(0, nbytes, _RANGE):
                size = min(_RANGE, nbytes - start)
                for piece in blobs.pieces(f"{name}/{file}", start, size):
                    digest.update(piece)
                    out.write(piece)
        if digest.hexdigest() != files[file]["xxh3_128"]:
            raise ValueError(f"{blobs.where(f'{name}/{file}')} is damaged; {FIX}")
    (target / HEADER).write_text(text, encoding="utf-8")

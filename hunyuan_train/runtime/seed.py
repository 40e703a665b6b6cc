"""Random numbers keyed by what they are for, not by which rank draws them.

Every draw names the run seed, its purpose ("noise", "time", "text_drop", "posterior", ...), the
global sample id and the epoch. The key is hashed to a 128-bit Philox key, so a draw is the same on
any rank, in any layout, in any order, before and after a restart.
"""

import hashlib

import numpy as np
import torch
from torch import Tensor


def keyed_generator(
    seed: int, purpose: str, sample_id: str | int = "", epoch: int = 0
) -> np.random.Generator:
    """Return a counter-based (Philox) generator for one purpose of one sample in one epoch."""
    key = int.from_bytes(_digest(seed, purpose, sample_id, epoch), "little")
    return np.random.Generator(np.random.Philox(key=key))


def keyed_torch_generator(
    seed: int, purpose: str, sample_id: str | int = "", epoch: int = 0
) -> torch.Generator:
    """Return a torch CPU generator for the same key, for draws that torch must make itself."""
    key = int.from_bytes(_digest(seed, purpose, sample_id, epoch)[:7], "little")
    return torch.Generator().manual_seed(key)


def _digest(seed: int, purpose: str, sample_id: str | int, epoch: int) -> bytes:
    text = f"{seed}\x1f{purpose}\x1f{sample_id}\x1f{epoch}".encode()
    return hashlib.blake2b(text, digest_size=16).digest()


def keyed_uniform(seed: int, purpose: str, sample_id: str | int = "", epoch: int = 0) -> float:
    """Return one uniform draw in [0, 1)."""
    return float(keyed_generator(seed, purpose, sample_id, epoch).random())


def keyed_normal(
    shape: tuple[int, ...],
    seed: int,
    purpose: str,
    sample_id: str | int = "",
    epoch: int = 0,
) -> Tensor:
    """Return standard normal float32 draws of the given shape, on the CPU."""
    generator = keyed_generator(seed, purpose, sample_id, epoch)
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


def keyed_permutation(
    length: int, seed: int, purpose: str, sample_id: str | int = "", epoch: int = 0
) -> np.ndarray:
    """Return a permutation of ``range(length)`` as int64."""
    return keyed_generator(seed, purpose, sample_id, epoch).permutation(length)

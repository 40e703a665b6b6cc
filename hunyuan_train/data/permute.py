"""Keyed permutations of range(n) that are evaluated at single places and never stored.

A place is written as two digits ``(left, right)`` of base ``a`` and ``b``, ``a * b >= n``. Every
round adds a keyed hash of one digit to the other, modulo its base, which can be undone: a Feistel
network. Its range is at most ``sqrt(n)`` larger than ``n``; what falls outside is sent through
again until it is inside (cycle walking), so the whole is a bijection of range(n).
"""

import hashlib
from typing import TypeAlias

import numpy as np

Ints: TypeAlias = np.ndarray | np.integer | int
MAX_LENGTH = 2**40
_ROUNDS = 10
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_ROUND_KEYS = [np.uint64((_GOLDEN * (number + 1)) % 2**64) for number in range(_ROUNDS)]
_HALF = np.uint64(32)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def text_key(*parts: str | int) -> int:
    """Return a 64-bit key of some words, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def mixed(key: Ints, number: Ints) -> np.ndarray:
    """Return uint64 keys of (key, number) pairs: the finaliser of splitmix64."""
    with np.errstate(over="ignore"):  # Single numbers wrap with a warning, arrays without.
        bits = np.asarray(key, np.uint64) + np.asarray(number, np.uint64) * np.uint64(_GOLDEN)
        bits = (bits ^ (bits >> _SHIFTS[0])) * _FIRST
        bits = (bits ^ (bits >> _SHIFTS[1])) * _SECOND
        return np.asarray(bits ^ (bits >> _SHIFTS[2]))


def permute(places: Ints, length: Ints, key: Ints) -> np.ndarray:
    """Return where the permutations of ``range(length)`` named by ``key`` send ``places``.

    Args:
        places: Integers in 0..length-1.
        length: 1..2^40; one for all, or one for each place.
        key: 64-bit keys; one for all, or one for each place.

    Returns:
        int64, of the common shape of the arguments.
    """
    places, length, key = np.broadcast_arrays(
        np.asarray(places, np.int64), np.asarray(length, np.int64), np.asarray(key, np.uint64)
    )
    assert not length.size or (length.min() >= 1 and length.max() <= MAX_LENGTH), "length"
    assert not places.size or (places.min() >= 0 and (places < length).all()), "places"
    shape = places.shape
    places, length, key = places.ravel(), length.ravel(), key.ravel()
    first = np.ceil(np.sqrt(length)).astype(np.uint64)
    second = -(-length // first.astype(np.int64))
    second = second.astype(np.uint64)
    result = _shuffled(places.astype(np.uint64), first, second, key)
    limit = length.astype(np.uint64)
    outside = np.flatnonzero(result >= limit)
    while len(outside):
        result[outside] = _shuffled(result[outside], first[outside], second[outside], key[outside])
        outside = outside[result[outside] >= limit[outside]]
    return result.astype(np.int64).reshape(shape)


def _shuffled(
    places: np.ndarray, first: np.ndarray, second: np.ndarray, key: np.ndarray
) -> np.ndarray:
    """Send uint64 [n] through the network of range(first * second) once."""
    left, right = np.divmod(places, second)
    for number in range(0, _ROUNDS, 2):
        left = _added(left, right, first, key ^ _ROUND_KEYS[number])
        right = _added(right, left, second, key ^ _ROUND_KEYS[number + 1])
    return left * second + right


def _added(digit: np.ndarray, other: np.ndarray, base: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return ``digit`` plus a hash of ``other`` below ``base``, modulo ``base``."""
    bits = (other + key) * _FIRST
    bits = (bits ^ (bits >> _HALF)) * _SECOND
    total = digit + (((bits >> _HALF) * base) >> _HALF)
    return np.minimum(total, total - base)  # Below base, the difference wraps to a huge number.

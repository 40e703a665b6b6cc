"""Keyed permutations: bijective at every length, different for every key, even, and large."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hunyuan_train.data.permute import MAX_LENGTH, mixed, permute, text_key

GOLDEN = [1, 8, 7, 6, 0, 2, 9, 5, 3, 4]
KEYS = st.integers(0, 2**64 - 1)


@settings(max_examples=150, deadline=None)
@given(length=st.integers(1, 3000), key=KEYS)
def test_every_place_is_hit_once(length: int, key: int) -> None:
    assert sorted(permute(np.arange(length), length, key)) == list(range(length))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_places_do_not_depend_on_what_is_asked_beside_them(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, MAX_LENGTH), min_size=1, max_size=20))
    places = [data.draw(st.integers(0, length - 1)) for length in lengths]
    keys = [data.draw(KEYS) for _ in lengths]
    together = permute(np.array(places), np.array(lengths), np.array(keys, np.uint64))
    alone = [int(permute(*arguments)) for arguments in zip(places, lengths, keys, strict=True)]
    assert together.dtype == np.int64
    assert together.tolist() == alone
    assert all(0 <= image < length for image, length in zip(alone, lengths, strict=True))


def test_large_lengths_have_no_collision_and_fill_the_range() -> None:
    places = np.concatenate([np.arange(50_000), MAX_LENGTH - 1 - np.arange(50_000)])
    image = permute(places, MAX_LENGTH, 7)
    assert len(np.unique(image)) == len(places)
    assert abs(image.mean() / MAX_LENGTH - 0.5) < 0.005
    odd = permute(places[:50_000], MAX_LENGTH - 12345, 7)
    assert odd.max() < MAX_LENGTH - 12345


@pytest.mark.parametrize("length", [2, 3, 4, 7, 16, 17, 40])
def test_each_place_goes_everywhere_equally_often(length: int) -> None:
    draws = 20_000
    keys = mixed(text_key("even", length), np.arange(draws))[:, None]
    image = permute(np.arange(length), length, keys)
    expected = draws / length
    counts = np.stack([np.bincount(column, minlength=length) for column in image.T])
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), (length - 1) ** 2
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("length", [3, 8, 30])
def test_neighbours_part_equally_often(length: int) -> None:
    draws = 20_000
    keys = mixed(text_key("pairs", length), np.arange(draws))[:, None]
    image = permute(np.array([0, 1]), length, keys)
    counts = np.bincount(image[:, 0] * length + image[:, 1], minlength=length**2)
    apart = counts[~np.eye(length, dtype=bool).ravel()]
    expected, freedom = draws / len(apart), len(apart) - 1
    assert apart.sum() == draws
    chi_square = ((apart - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)


def test_keys_give_different_orders_and_never_change() -> None:
    orders = {tuple(permute(np.arange(50), 50, key)) for key in range(500)}
    assert len(orders) == 500
    # Written down once: a checkpoint's position has its meaning by these numbers.
    assert permute(np.arange(10), 10, text_key(3, "row order", "x")).tolist() == GOLDEN
    assert text_key(1, "a") != text_key("1a") != text_key("1", "", "a")
    assert int(mixed(0, 1)) == 0xE220A8397B1DCDAF  # splitmix64's first output for seed 0


def test_wrong_places_and_lengths_are_our_bugs() -> None:
    for place, length in ((5, 5), (-1, 5), (0, 0), (0, MAX_LENGTH + 1)):
        with pytest.raises(AssertionError):
            permute(place, length, 1)

"""Layouts that cannot hold a bucket are refused in one sentence."""

import pytest

from hunyuan_train.parallel.apply import check_sequence
from hunyuan_train.parallel.config import ParallelConfig


def test_no_sequence_has_fewer_tokens_than_shards() -> None:
    tokens = {"5x64x64": 32, "1x64x64": 16, "1x64x80": 20}
    check_sequence(tokens, ParallelConfig(cp_ring=16))
    check_sequence(tokens, ParallelConfig(tp=2, sp=True, cp_ring=8))
    with pytest.raises(
        ValueError,
        match=r"parallel\.cp_ring=17 .* cuts a sequence into 17, but bucket 1x64x64 has 16 image "
        r"tokens; choose a product up to 16",
    ):
        check_sequence(tokens, ParallelConfig(cp_ring=17))
    with pytest.raises(ValueError, match=r"parallel\.tp=2 cuts a sequence into 32"):
        check_sequence(tokens, ParallelConfig(tp=2, sp=True, cp_ring=16))

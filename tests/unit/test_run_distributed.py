"""The helper that other tests stand on has to report failures truly."""

import os

import pytest
import torch
import torch.distributed as dist
from distributed import RankError, run_distributed

pytestmark = pytest.mark.dist


def _sum_of_ranks(rank: int, world: int, offset: int) -> tuple[float, int]:
    value = torch.tensor([float(rank + offset)])
    dist.all_reduce(value)
    return value.item(), torch.get_num_threads()


def _second_rank_fails(rank: int, world: int) -> None:
    if rank == 1:
        raise KeyError("the reason")
    dist.barrier()


def _second_rank_dies(rank: int, world: int) -> None:
    if rank == 1:
        os._exit(7)
    dist.barrier()


def test_results_come_back_in_rank_order():
    assert run_distributed(_sum_of_ranks, 3, 10) == [(33.0, 1)] * 3


def test_the_traceback_of_the_failed_rank_is_raised():
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed:.*_second_rank_fails.*the reason"):
        run_distributed(_second_rank_fails, 2)


def test_a_dead_rank_is_named_with_its_exit_code():
    with pytest.raises(RankError, match=r"rank 1 died with exit code 7|rank 0 of 2 failed"):
        run_distributed(_second_rank_dies, 2)

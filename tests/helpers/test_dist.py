"""The helper itself: results by rank, a failed rank's traceback, no hang."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers.dist import RankError, run_distributed


def _sum(rank: int, world_size: int, factor: int) -> tuple[int, float]:
    value = torch.tensor(float(rank * factor))
    dist.all_reduce(value)
    return rank, value.item()


def _fail(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier()


def _hang(rank: int, world_size: int) -> None:
    time.sleep(600)


def test_results_come_back_by_rank() -> None:
    assert run_distributed(_sum, 2, 10) == [(0, 10.0), (1, 10.0)]


def test_a_failed_rank_fails_the_call_with_its_traceback() -> None:
    with pytest.raises(RankError, match="rank one is unhappy"):
        run_distributed(_fail, 2)


def test_a_hang_is_killed() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\]"):
        run_distributed(_hang, 2, timeout=10)

"""Every strategy equals a single-process fp64 oracle: output, lse and all gradients."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallel.attention import attend_with_lse
from parallel.layout import shard
from tests.helpers.attention import Answer, Case, Tensors, cases, make, oracle, relative_error
from tests.helpers.dist import run_distributed

FP32_BOUND = 5e-6  # of the largest value
BF16_BOUND = 2e-2


def _attend(case: Case, tensors: Tensors, rank: int, world_size: int) -> Answer:
    def local(x: torch.Tensor) -> torch.Tensor:
        return shard(x, 1, world_size, rank, case.layout)

    q, k, v = (local(x).requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    out, lse = attend_with_lse(
        *(q, k, v),
        group=dist.group.WORLD,
        strategy=case.strategy,
        layout=case.layout,
        causal=case.causal,
        document_ids=None if tensors.document_ids is None else local(tensors.document_ids),
        scale=case.scale,
    )
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), local(tensors.d_out))
    return Answer(out, lse, dq, dk, dv)


def _errors(case: Case, rank: int, world_size: int) -> dict[str, float]:
    tensors = make(case, world_size)
    exact, ours = oracle(case, tensors), _attend(case, tensors, rank, world_size)
    return {
        name: relative_error(getattr(ours, name), shard(getattr(exact, name), 1, world_size, rank, case.layout))
        for name in ("out", "lse", "dq", "dk", "dv")
    }


def _all_errors(rank: int, world_size: int, wanted: list[Case]) -> list[dict[str, float]]:
    return [_errors(case, rank, world_size) for case in wanted]


def _check(world_size: int, wanted: list[Case], bound: float) -> None:
    for rank, errors in enumerate(run_distributed(_all_errors, world_size, wanted)):
        for case, found in zip(wanted, errors, strict=True):
            assert max(found.values()) < bound, f"rank {rank}, {case}: {found}"


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_strategy_equals_the_oracle(world_size: int) -> None:
    _check(world_size, cases(world_size), FP32_BOUND)

"""Every strategy equals a single-process fp64 oracle: output, lse and all gradients."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from conf.errors import ConfigError
from parallel.attention import attend_with_lse
from parallel.layout import shard
from tests.helpers.attention import Answer, Case, Tensors, cases, make, oracle, relative_error
from tests.helpers.dist import run_distributed

FP32_BOUND = 5e-6  # of the largest value
BF16_BOUND = 8e-3  # two units in the last place


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


def test_other_dtypes_padding_scales_and_tiny_shards() -> None:
    base = [Case(s, "zigzag", True, 4, 2, "padded", 26) for s in ("ring", "token_ring")]
    bf16 = [replace(case, dtype=torch.bfloat16) for case in base]
    fp64 = [replace(case, dtype=torch.float64) for case in base]
    tiny = [replace(case, local_seq=2, batch=1, documents="none") for case in base]
    scaled = [replace(case, scale=0.7, head_dim=5) for case in base]
    exact = [*base, *tiny, *scaled]
    bounds = [(exact, FP32_BOUND), (bf16, BF16_BOUND), (fp64, 1e-13)]
    results = run_distributed(_all_errors, 2, [case for some, _ in bounds for case in some])
    for rank, errors in enumerate(results):
        found = iter(errors)
        for some, bound in bounds:
            for case in some:
                error = next(found)
                assert max(error.values()) < bound, f"rank {rank}, {case}: {error}"


def _twice(rank: int, world_size: int) -> list[bool]:
    same = []
    for case in cases(world_size)[::5]:
        tensors = make(case, world_size)
        first, second = (_attend(case, tensors, rank, world_size) for _ in range(2))
        same += [torch.equal(getattr(first, n), getattr(second, n)) for n in ("out", "lse", "dq", "dk", "dv")]
    return same


def test_runs_repeat_bit_by_bit() -> None:
    for same in run_distributed(_twice, 3):
        assert len(same) > 20
        assert all(same)


def _disagree(rank: int, world_size: int) -> list[str]:
    """Calls that differ between the ranks, then one that does not: the group must still work."""
    messages = []
    good = {"strategy": "ring", "layout": "contiguous", "group": dist.group.WORLD}
    for length, changes in [
        (4 + rank, {}),
        (4, {"causal": rank == 0}),
        (4, {"strategy": ["ring", "token_ring"][rank]}),
    ]:
        q = torch.ones(1, length, 2, 4)
        try:
            attend_with_lse(q, q, q, **(good | changes))
            messages.append("no error")
        except ConfigError as error:
            messages.append(str(error))
    q = torch.ones(1, 4, 2, 4)
    messages.append(str(attend_with_lse(q, q, q, **good)[0].shape[1]))
    try:
        attend_with_lse(q, q, q, strategy="local", layout="contiguous", group=dist.group.WORLD)
    except ConfigError as error:
        messages.append(str(error))
    return messages


def test_ranks_that_disagree_get_an_error_instead_of_a_hang() -> None:
    for rank, messages in enumerate(run_distributed(_disagree, 2, timeout=60)):
        assert all(f"ranks [{1 - rank}] pass another" in message for message in messages[:3]), messages
        assert messages[3] == "4"
        assert "keeps a whole sequence on one rank, the group has 2" in messages[4]


def _same_ids_changed(rank: int, world_size: int) -> list[float]:
    """A tensor of document ids that is changed in place must not meet the masks of its old contents."""
    case = Case("token_ring", "zigzag", True, 2, 2, "random", 8)
    tensors = make(case, world_size)
    ids = shard(tensors.document_ids, 1, world_size, rank, case.layout) if tensors.document_ids is not None else None
    assert ids is not None
    q, k, v = (shard(x, 1, world_size, rank, case.layout) for x in (tensors.q, tensors.k, tensors.v))
    errors = []
    for documents in (tensors.document_ids, torch.zeros_like(ids).repeat(1, world_size)):
        assert documents is not None
        ids.copy_(shard(documents, 1, world_size, rank, case.layout))
        out, _ = attend_with_lse(
            *(q, k, v), group=dist.group.WORLD, strategy="token_ring", layout="zigzag", document_ids=ids
        )
        exact = oracle(case, replace(tensors, document_ids=documents)).out
        errors.append(relative_error(out, shard(exact, 1, world_size, rank, case.layout)))
    return errors


def test_document_ids_may_change_in_place() -> None:
    for errors in run_distributed(_same_ids_changed, 2):
        assert max(errors) < FP32_BOUND

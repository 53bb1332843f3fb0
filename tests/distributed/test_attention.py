"""Attention over gloo ranks: equal to a single-process fp64 oracle through the operator, autograd and the real wire."""

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.errors import ConfigError, SundogError
from fused.mask import CAUSAL, FULL, Mask
from parallel.attention import SequenceParallelCore, attend, attend_with_lse
from parallel.decode import attend_split_cache
from parallel.layout import Layout, contiguous
from parallel.recompute import recompute_blocks
from parallel.ring import engine
from parallel.strategies import STRATEGIES
from tests.helpers.attention import Answer, Case, errors, layouts, make, oracle, run_in_memory
from tests.helpers.dist import RankError, run_distributed

FP32_BOUND = 5e-6  # of the largest value
NAMES = tuple(name for name in STRATEGIES if name != "local")


def _attend(case: Case, rank: int) -> Answer:
    """This rank's part of the answer."""
    tensors = make(case)
    queries, keys = layouts(case, tensors.documents)
    q = queries.shard(tensors.q, 1, rank).requires_grad_()
    k, v = (keys.shard(x, 1, rank).requires_grad_() for x in (tensors.k, tensors.v))
    out, lse = attend_with_lse(
        *(q, k, v),
        group=dist.group.WORLD,
        strategy=case.strategy,
        layout=queries,
        key_layout=keys,
        mask=case.mask,
        document_ids=None if tensors.documents is None else keys.shard(tensors.documents, 1, rank),
        scale=case.scale,
        dropout=case.dropout,
        seed=7,
        timeout=60,
    )
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), queries.shard(tensors.d_out, 1, rank))
    return Answer(out.detach(), lse, dq, dk, dv)


def _shard_of(case: Case, whole: Answer, rank: int) -> Answer:
    queries, keys = layouts(case, make(case).documents)
    sides = {"out": queries, "lse": queries, "dq": queries, "dk": keys, "dv": keys}
    return Answer(**{name: side.shard(whole.named()[name], 1, rank) for name, side in sides.items()})


def _cases(ranks: int) -> list[Case]:
    settings = [
        Case("", ranks),
        Case("", ranks, documents="random", layout="balanced", heads=3, kv_heads=1),
        Case("", ranks, mask=Mask(left=9, right=0), layout="lopsided", value_dim=6, dropout=0.2),
        Case("", ranks, mask=FULL, layout="contiguous", queries=11, batch=1, scale=0.7),
    ]
    return [replace(setting, strategy=name) for setting in settings for name in NAMES]


def _compare(rank: int, world_size: int) -> tuple[list[float], list[bool]]:
    """Errors against the oracle, and whether the wire changes a bit of what threads of one process compute."""
    found, same = [], []
    for case in _cases(world_size):
        ours = _attend(case, rank)
        found.append(max(errors(ours, _shard_of(case, oracle(case), rank)).values()))
        if case.layout == "zigzag":
            in_memory = _shard_of(case, run_in_memory(case)[0], rank)
            same += [torch.equal(x, in_memory.named()[name]) for name, x in ours.named().items()]
    return found, same


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_strategy_equals_the_oracle(world_size: int) -> None:
    for rank, (found, same) in enumerate(run_distributed(_compare, world_size)):
        for case, error in zip(_cases(world_size), found, strict=True):
            assert error < FP32_BOUND, f"rank {rank}, {case}: {error}"
        assert len(same) == 5 * len(NAMES)
        assert all(same)


def _disagree(rank: int, world_size: int) -> list[str]:
    """Calls that differ between the ranks, each followed by one that does not: the group must still work."""
    messages = []
    good: dict[str, Any] = {"strategy": "ring", "layout": "contiguous", "group": dist.group.WORLD}
    for changes in (
        {"q": torch.ones(1, 4, 2, 4 + 4 * rank)},
        {"q": torch.ones(1, 4, 2, 4, dtype=torch.float32 if rank == 0 else torch.float64)},
        {"layout": contiguous(8 + rank, 2)},
        {"mask": CAUSAL if rank == 0 else FULL},
        {"strategy": ["ring", "token_ring"][rank]},
    ):
        call: dict[str, Any] = {**good, **changes}
        q = call.pop("q", torch.ones(1, 4, 2, 4))
        for x, settings in ((q, call), (torch.ones(1, 4, 2, 4), good)):
            try:
                messages.append(f"fine {tuple(attend(x, x, x, **settings).shape)}")
            except ConfigError as error:
                messages.append(str(error))
    return messages


def test_ranks_that_disagree_get_an_error_instead_of_a_hang() -> None:
    results = run_distributed(_disagree, 2, timeout=60)
    for rank, messages in enumerate(results):
        assert all(message == "fine (1, 4, 2, 4)" for message in messages[1::2]), messages
        for message in messages[::2]:
            assert f"ranks [{1 - rank}] pass another" in message or "of the layout holds" in message, messages


def _same_ids_changed(rank: int, world_size: int) -> list[float]:
    """A tensor of document ids that is changed in place must not meet the masks of its old contents."""
    case = Case("token_ring", world_size, documents="random", heads=2, kv_heads=2, keys=18)
    tensors = make(case)
    assert tensors.documents is not None
    layout, _ = layouts(case, None)
    q, k, v = (layout.shard(x, 1, rank) for x in (tensors.q, tensors.k, tensors.v))
    ids, found = torch.empty_like(layout.shard(tensors.documents, 1, rank)), []
    for documents in (tensors.documents, torch.zeros_like(tensors.documents)):
        ids.copy_(layout.shard(documents, 1, rank))
        out = attend(q, k, v, group=dist.group.WORLD, strategy="token_ring", layout="zigzag", document_ids=ids)
        exact = oracle(case, replace(tensors, documents=documents)).out
        found.append((out - layout.shard(exact, 1, rank)).abs().max().item())
    return found


class _Block(nn.Module):
    def __init__(self, core: SequenceParallelCore) -> None:
        super().__init__()
        self.project, self.core = nn.Linear(8, 8, bias=False), core

    def forward(self, x: Tensor) -> Tensor:
        q = self.project(x).unflatten(2, (2, 4))
        return x + self.core(q, q, q, None).flatten(2).tanh()


def _recompute(rank: int, world_size: int) -> tuple[list[int], bool]:
    """Schedules run without and with recomputation, and whether the gradients are the same bits."""
    torch.manual_seed(0)
    blocks = nn.ModuleList([_Block(SequenceParallelCore(dist.group.WORLD, "token_ring", "zigzag")) for _ in range(2)])
    x = torch.randn(2, 4, 8)
    runs, real = [0], engine.run

    def counted(*args: object) -> None:
        runs[0] += 1
        real(*args)  # pyright: ignore[reportArgumentType]

    engine.run = counted  # pyright: ignore[reportAttributeAccessIssue]
    counts, gradients = [], []
    for recompute in (False, True):
        if recompute:
            recompute_blocks(blocks, "full")
        runs[0], out = 0, x
        for block in blocks:
            out = block(out)
        out.square().sum().backward()
        counts.append(runs[0])
        gradients.append([p.grad.clone() for p in blocks.parameters() if p.grad is not None])
        blocks.zero_grad()
    return counts, all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def _split_cache(rank: int, world_size: int) -> list[float]:
    """New tokens over a cache that is split unevenly, one part empty."""
    found = []
    for new, mask in ((1, CAUSAL), (5, CAUSAL), (3, Mask(left=6, right=0))):
        case = Case("", world_size, mask=mask, keys=23, queries=new, heads=6, kv_heads=2, value_dim=5)
        tensors, keys = make(case), Layout.of([[(0, 9), (20, 23)], [(9, 20)], *[[]] * (world_size - 2)])
        k, v = (keys.shard(x, 1, rank) for x in (tensors.k, tensors.v))
        out = attend_split_cache(
            tensors.q, k, v, group=dist.distributed_c10d._get_default_group(), keys=keys, mask=mask
        )
        found.append((out - oracle(case).out).abs().max().item())
    return found


def _in_one_gang(rank: int, world_size: int) -> tuple[list[float], tuple[list[int], bool]]:
    return _same_ids_changed(rank, world_size) + _split_cache(rank, world_size), _recompute(rank, world_size)


def test_changed_documents_split_caches_and_recomputation_without_communication() -> None:
    for found, (counts, same) in run_distributed(_in_one_gang, 3):
        assert max(found) < FP32_BOUND
        assert counts == [4, 4]  # two layers, forward and backward
        assert same


def _one_fails(rank: int, world_size: int, how: str, folder: str) -> None:
    q = torch.ones(1, 4, 2, 4)
    call: dict[str, Any] = {"group": dist.group.WORLD, "strategy": "ring", "layout": "contiguous"}
    attend(q, q, q, **call)  # a healthy one, however busy the machine
    call["timeout"] = 2.0
    if rank == 2:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(8)  # a rank that lags, longer than the others wait
        os._exit(0)
    try:
        attend(q, q, q, **call)
    except SundogError as error:
        Path(folder, str(rank)).write_text(str(error))
        deadline = time.monotonic() + 60
        while len(os.listdir(folder)) < world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.1)  # a rank that ends stops the others: let each say what it found
        raise


@pytest.mark.parametrize("how", ["dies", "lags"])
def test_a_lost_rank_is_named_on_all_others(how: str, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 2 is lost"):
        run_distributed(_one_fails, 3, how, str(tmp_path), timeout=300)
    messages = [Path(tmp_path, str(rank)).read_text() for rank in (0, 1)]
    assert all("rank 2 is lost" in message for message in messages), messages

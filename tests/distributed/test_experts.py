"""Experts on several ranks: what one process computes, bit by bit, for any split of tokens and experts."""

from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import ConfigError
from conf.rules import MeshSizes
from models.moe.exchange import LocalExchange
from models.moe.layer import ExpertLayer, ExpertStack
from models.moe.router import Routing
from models.spec import ExpertSpec
from parallel.experts import Placement, ShardedExchange
from parallel.layout import named_layout
from tests.helpers.dist import run_distributed
from tests.unit.models.moe import TWO

WINDOWS, CONTEXT, DIM = 2, 64, 32
ROUTER_BOUND = 1e-7  # of router gradients, relative to the largest entry; parts rounded before their sum do not keep it


@dataclass(frozen=True)
class Case:
    cp: int
    ep: int
    layout: str = "zigzag"
    text: float = 0.5
    groups: tuple[int, ...] = (4, 4)
    noise: bool = False
    pool: str = "sequence_group"
    routing: str = "expert_choice"


def layer_of(case: Case) -> ExpertLayer:
    experts = ExpertSpec(groups=case.groups, noise=case.noise, pool=case.pool, routing=case.routing)
    layer = ExpertLayer(replace(TWO, dim=DIM, ffn_dim=48, experts=experts), 3, Routing(step=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return layer


def whole(case: Case, seqs: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, modalities and the gradient of the output of ``seqs`` sequence groups, [windows, context, ...]."""
    generator = torch.Generator().manual_seed(1)
    shape = (seqs * WINDOWS, CONTEXT)
    x, d_out = (torch.randn(*shape, DIM, generator=generator) for _ in range(2))
    runs = torch.rand(shape[0], CONTEXT // 4, generator=generator).repeat_interleave(4, 1)  # images lie together
    return x, (runs >= case.text).long(), d_out


def gradients(layer: ExpertLayer, out: Tensor, x: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(out, [x, *parameters], d_out)
    return dict(zip(("x", *names), found, strict=True)) | {"y": out.detach()}


@cache
def one_process(case: Case, seqs: int) -> dict[str, Tensor]:
    layer, (x, kinds, d_out) = layer_of(case), whole(case, seqs)
    x = x.requires_grad_()
    index, length = LocalExchange().places(kinds.shape[0], CONTEXT, 0, x.device)
    tokens = LocalExchange().tokens(kinds, index, case.groups, WINDOWS * length)
    return gradients(layer, layer(x, tokens), x, d_out)


def on_ranks(rank: int, world_size: int, cases: list[Case]) -> list[dict[str, Any]]:
    results = []
    for case in cases:
        ranks = max(case.cp, case.ep)
        groups = [dist.new_group(list(range(r, r + ranks))) for r in range(0, world_size, ranks)]
        group = groups[rank // ranks]
        assert isinstance(group, dist.ProcessGroup)
        layer, (x, kinds, d_out) = layer_of(case), whole(case, world_size // case.cp)
        layout = named_layout(case.layout, CONTEXT, case.cp)
        first = rank // case.cp * WINDOWS
        x, kinds, d_out = (
            layout.shard(t[first : first + WINDOWS], 1, rank % case.cp).clone() for t in (x, kinds, d_out)
        )
        x = x.requires_grad_()
        placement = Placement(case.groups, ranks, case.ep, case.pool)
        exchange = ShardedExchange(group, case.cp, case.layout, placement)
        layer.control.exchange = exchange
        for stack in layer.modules():
            if isinstance(stack, ExpertStack):
                for parameter in stack.parameters():
                    parameter.data = parameter.data.chunk(case.ep)[rank % case.ep].clone()
        index, length = exchange.places(WINDOWS, CONTEXT // case.cp, first, x.device)
        tokens = exchange.tokens(kinds, index, case.groups, WINDOWS * length)
        counted = Counted()
        out = layer(x, tokens)
        calls = [counted.stop()]
        counted = Counted()
        found: dict[str, Any] = gradients(layer, out, x, d_out)
        calls.append(counted.stop())
        for name, gradient in found.items():  # what FSDP does: sum over the ranks that hold the same part
            if name == "router.weight":
                dist.all_reduce(gradient)
            elif ".experts." in f".{name}" and case.ep < world_size:
                parts = [torch.empty_like(gradient) for _ in range(world_size)]
                dist.all_gather(parts, gradient)
                found[name] = torch.stack(parts[rank % case.ep :: case.ep]).sum(0)
        results.append(found | {"calls": calls})
        dist.barrier()
    return results


class Counted:
    """Counts collectives and reads by the host."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {"all_to_all_single": 0, "all_gather": 0, "reduce": 0, "tolist": 0}
        self.kept = {name: getattr(dist, name, None) or getattr(Tensor, name) for name in self.found}
        for name in self.found:
            setattr(Tensor if name == "tolist" else dist, name, self.counting(name))

    def counting(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.found[name] += 1
            return self.kept[name](*args, **kwargs)

        return call

    def stop(self) -> dict[str, int]:
        for name, own in self.kept.items():
            setattr(Tensor if name == "tolist" else dist, name, own)
        return self.found


MIXES = [0.0, 0.1, 0.5, 0.9, 1.0]
CASES = {
    2: [
        *(Case(2, 2, layout, text) for layout in ("contiguous", "zigzag") for text in MIXES),
        Case(1, 2),
        Case(1, 2, text=0.9),
        Case(2, 1),
        Case(2, 1, "contiguous", 0.9, noise=True),
        Case(2, 2, noise=True),
        Case(2, 2, groups=(8,)),
        Case(2, 2, groups=(6, 2), layout="contiguous"),
        Case(2, 2, routing="token_choice"),
        Case(1, 2, pool="local"),
    ],
    4: [
        *(Case(4, 4, layout, text) for layout in ("contiguous", "zigzag") for text in MIXES),
        Case(4, 2),
        Case(4, 2, "contiguous", 0.9),
        Case(4, 2, groups=(2, 2)),
        Case(2, 4),
        Case(2, 4, "contiguous", 0.1),
        Case(1, 4),
        Case(4, 1),
        Case(4, 1, "contiguous", 0.1),
        Case(4, 1, groups=(8,)),
        Case(4, 1, groups=(4, 2)),
        Case(2, 2),
    ],
}


def exact_gradients(case: Case) -> bool:
    """Where every expert is computed by one rank for all tokens of the case's world."""
    return case.ep == max(case.cp, case.ep) or all(g % case.cp == 0 for g in case.groups)


@pytest.mark.parametrize("world_size", CASES)
def test_ranks_compute_what_one_process_does(world_size: int) -> None:
    cases = CASES[world_size]
    results = run_distributed(on_ranks, world_size, cases)
    for number, case in enumerate(cases):
        whole_run = one_process(case, world_size // case.cp)
        for rank in range(world_size):
            check(case, rank, world_size, results[rank][number], whole_run)


def check(case: Case, rank: int, world_size: int, mine: dict[str, Any], exact: dict[str, Tensor]) -> None:
    where = f"rank {rank} of {case}"
    layout, first = named_layout(case.layout, CONTEXT, case.cp), rank // case.cp * WINDOWS
    for name in ("y", "x"):
        part = layout.shard(exact[name][first : first + WINDOWS], 1, rank % case.cp)
        if exact_gradients(case):
            assert torch.equal(mine[name], part), (where, name)
        else:
            torch.testing.assert_close(mine[name], part, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{where} {n} {m}")
    for name, gradient in exact.items():
        if name.startswith("experts."):
            part = gradient.chunk(case.ep)[rank % case.ep]
            one_group = max(case.cp, case.ep) == world_size
            if exact_gradients(case) and one_group:
                assert torch.equal(mine[name], part), (where, name)
            else:
                torch.testing.assert_close(mine[name], part, rtol=1e-5, atol=1e-5)
        elif name == "router.weight":
            error = ((mine[name] - gradient).abs().max() / gradient.abs().max()).item()
            assert error < ROUTER_BOUND, (where, name)
    for calls in mine["calls"]:  # forward, backward
        assert calls["all_gather"] + calls["reduce"] <= 1, where
        assert calls["all_to_all_single"] == 2, where
        assert calls["tolist"] <= 1, where


def test_experts_of_every_group_lie_on_every_rank() -> None:
    placement = Placement((4, 2), 2, 2)
    assert placement.owners(0) == placement.owners(1) == [0, 0, 1, 1, 0, 1]
    divided = Placement((4, 4), 4, 2)
    assert divided.owners(0) == divided.owners(3) == [0, 2, 1, 3, 0, 2, 1, 3]
    assert divided.computed(3) == [slice(1, 2), slice(1, 2)]
    apart = Placement((2, 2), 4, 2)
    assert (apart.owners(1), apart.owners(2)) == ([0, 1, 0, 1], [2, 3, 2, 3])
    assert Placement((4, 4), 2, 1).moves
    local = Placement((4, 4), 2, 1, "local")
    assert not local.moves
    assert local.owners(1) == [1] * 8


def test_experts_that_ranks_do_not_divide_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"sharding\.expert_degree") as raised:
        Placement((6, 2), 4, 4)
    assert "[6, 2]" in raised.value.rule
    assert MeshSizes(1, 1, 1).ep == 1

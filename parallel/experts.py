"""Experts spread over ranks, and tokens that choose them together although they lie on several ranks.

``sequence_group`` pools: every rank of a pool gathers the logits of all its tokens and makes the same choice, so that
any number of ranks gives a token the same experts. The gathered choice also tells every rank what it will send and
receive: besides the two all-to-alls of the rows a layer has one collective and one read of counts by the host.

Rank ``r`` of ``ep`` holds the ``r``-th part of *every* group, hence the same number of rows whatever the mix of
modalities. Where ``ep`` is smaller than the number of ranks that exchange tokens, several ranks hold an expert; they
divide the experts among themselves (if the numbers allow it) and not the rows, so that an expert's gradient is one
product over all its rows in the order of their places, as in one process, and not a sum of partial ones. With ``local``
pools and ``ep`` 1 nothing travels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from conf.errors import ConfigError
from fused.grouped import Weights, grouped_swiglu
from models.decoder import Decoder
from models.moe.exchange import LocalExchange, Tokens, allowed, gates_of, segments_of
from models.moe.layer import ExpertStack
from parallel.layout import named_layout
from parallel.mesh import Mesh


@dataclass(frozen=True)
class Placement:
    """Which rank of ``ranks`` computes which expert, for tokens that come from a given rank."""

    groups: tuple[int, ...]
    ranks: int
    ep: int
    pool: str = "sequence_group"  # or local

    def __post_init__(self) -> None:
        if any(size % self.ep for size in self.groups):
            raise ConfigError(
                "sharding.expert_degree",
                self.ep,
                f"it divides the experts of every group, {list(self.groups)}",
                f"sharding.expert_degree={np.gcd.reduce(self.groups)}, or other model.experts.groups",
            )

    def parts(self, size: int) -> int:
        """Into how many parts, each for one of the ranks that hold it, a rank's experts of a group are divided."""
        copies = self.ranks // self.ep
        stays = self.ep == 1 and self.pool == "local"
        return 1 if stays or (size // self.ep) % copies else copies

    @property
    def moves(self) -> bool:
        """Whether rows travel."""
        return self.ep > 1 or any(self.parts(size) > 1 for size in self.groups)

    def owners(self, source: int) -> list[int]:
        """For each expert the rank that computes it for tokens of ``source``."""
        found = []
        for size in self.groups:
            held, parts = size // self.ep, self.parts(size)
            for expert in range(size):
                copy = (expert % held) // (held // parts) if parts > 1 else source // self.ep
                found.append(copy * self.ep + expert // held)
        return found

    def computed(self, rank: int) -> list[slice]:
        """Of the experts that a rank holds of each group, those that it computes."""
        found = []
        for size in self.groups:
            held, parts = size // self.ep, self.parts(size)
            first = (rank // self.ep) * (held // parts) if parts > 1 else 0
            found.append(slice(first, first + held // parts))
        return found


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks that they are for; backward, their gradients home."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (sent, received), group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        sent, received = ctx.splits
        out = grads[0].new_empty(sum(sent), *grads[0].shape[1:])
        dist.all_to_all_single(out, grads[0].contiguous(), sent, received, group=ctx.group)
        return out, None, None, None


def _send(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = _AllToAll.apply(rows, sent, received, group)
    assert isinstance(out, Tensor)
    return out


class ShardedExchange:
    """An ``Exchange`` (``models.moe.exchange``) among the ranks that share a sequence or experts.

    Args:
        group: those ranks, in order; consecutive ones (``cp`` of them) hold one sequence.
        cp: ranks of one sequence.
        layout: which tokens of it each holds.
        placement: of the experts.
    """

    def __init__(self, group: dist.ProcessGroup, cp: int, layout: str, placement: Placement) -> None:
        self.group, self.cp, self.layout, self.placement = group, cp, layout, placement
        self.ranks, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def places(self, batch: int, length: int, first_window: int, device: torch.device) -> tuple[Tensor, int]:
        whole = length * self.cp
        positions = torch.from_numpy(named_layout(self.layout, whole, self.cp).positions(self.rank % self.cp))
        windows = torch.arange(first_window, first_window + batch)
        return (windows[:, None] * whole + positions).to(device), whole

    def tokens(self, modality_BS: Tensor, index_BS: Tensor, groups: Sequence[int], pool_tokens: int) -> Tokens:
        modality, index = modality_BS.flatten(), index_BS.flatten()
        everyone = self._gather(torch.stack([index, modality], 1))
        order = everyone[..., 0].flatten().argsort(stable=True)
        places, kinds = everyone.flatten(0, 1)[order].unbind(1)
        if self.placement.pool == "local":
            places, kinds = index, modality
        segments = segments_of(kinds, places // pool_tokens, groups)
        return Tokens(index, places, allowed(modality, groups), segments, everyone[..., 0], order)

    def choose(
        self, values_NE: Tensor, tokens: Tokens, choose: Callable[[Tensor], Tensor], pooled: bool
    ) -> tuple[Tensor, Tensor]:
        if pooled and self.placement.pool == "sequence_group":
            assert tokens.order_T is not None, "tokens were described by this exchange"
            whole_TE = self._gather(values_NE).flatten(0, 1)
            chosen_TE = torch.empty_like(whole_TE, dtype=torch.bool)
            chosen_TE[tokens.order_T] = choose(whole_TE[tokens.order_T])
            chosen_GNE = chosen_TE.view(self.ranks, *values_NE.shape)
            return chosen_GNE[self.rank], chosen_GNE
        mine_NE = choose(values_NE)
        if not self.placement.moves:
            return mine_NE, mine_NE
        return mine_NE, self._gather(mine_NE.to(torch.uint8)).bool()

    def mix(
        self, x_ND: Tensor, tokens: Tokens, chosen: tuple[Tensor, Tensor], gates_NE: Tensor, weights: Weights
    ) -> Tensor:
        mine_NE, chosen_GNE = chosen
        if not self.placement.moves:
            return LocalExchange().mix(x_ND, tokens, (mine_NE, mine_NE), gates_NE, weights)
        assert tokens.places_GN is not None, "tokens were described by this exchange"
        owners = [self.placement.owners(source) for source in range(self.ranks)]
        counts = chosen_GNE.sum(1).tolist()  # [ranks][experts]: the one read by the host
        plan = _Plan.of(owners, counts, self.rank)

        rows = torch.nonzero_static(mine_NE.T, size=sum(counts[self.rank]))[:, 1]  # by expert, then place
        to_send = plan.send_order.to(x_ND.device)
        sent = x_ND.index_select(0, rows).index_select(0, to_send)
        arrived = _send(sent, plan.sent, plan.received, self.group)
        by_expert = self._by_expert(chosen_GNE, tokens.places_GN, owners, sum(plan.received))
        out = grouped_swiglu(arrived.index_select(0, by_expert), plan.loads, self._local(weights))
        home = _send(out.index_select(0, by_expert.argsort()), plan.received, plan.sent, self.group)
        out = home.index_select(0, to_send.argsort())
        gates = gates_of(gates_NE, mine_NE, out.dtype)
        return torch.zeros_like(x_ND, dtype=out.dtype).index_add(0, rows, out * gates[:, None])

    def sum(self, part: Tensor) -> Tensor:
        if self.placement.pool == "local" and not self.placement.moves:
            return part
        dist.reduce(part, group=self.group, group_dst=0)
        return part if self.rank == 0 else part.zero_()

    def _gather(self, values_N: Tensor) -> Tensor:
        """[ranks, N, ...]"""
        whole = values_N.new_empty(self.ranks, *values_N.shape)
        dist.all_gather(list(whole.unbind(0)), values_N.contiguous(), group=self.group)
        return whole

    def _by_expert(self, chosen_GNE: Tensor, places_GN: Tensor, owners: list[list[int]], rows: int) -> Tensor:
        """The order of the arrived rows (by source, expert, place) that sorts them by expert, then place."""
        here_GE = torch.tensor(owners, device=chosen_GNE.device) == self.rank
        arrived = (chosen_GNE & here_GE[:, None]).transpose(1, 2)
        source, expert, token = torch.nonzero_static(arrived, size=rows).unbind(1)
        place = places_GN[source, token]
        by_place = place.argsort(stable=True)
        return by_place[expert[by_place].argsort(stable=True)]

    def _local(self, weights: Weights) -> Weights:
        """The weights that this rank computes with."""
        parts = zip(self.placement.computed(self.rank), weights, strict=True)
        return [(_held(gate_up)[part], _held(down)[part]) for part, (gate_up, down) in parts]


def _held(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


@dataclass(frozen=True)
class _Plan:
    """What a rank sends and receives in one layer, from the counts of all ranks."""

    sent: list[int]  # rows to each rank
    received: list[int]  # rows from each rank
    loads: list[int]  # rows of each expert that this rank computes
    send_order: Tensor  # rows sorted by expert -> rows sorted by destination, then expert

    @classmethod
    def of(cls, owners: list[list[int]], counts: list[list[int]], rank: int) -> "_Plan":
        ranks, experts = range(len(owners)), range(len(owners[0]))
        mine, ends = owners[rank], np.cumsum([0, *counts[rank]])
        sent = [sum(counts[rank][e] for e in experts if mine[e] == to) for to in ranks]
        received = [sum(counts[source][e] for e in experts if owners[source][e] == rank) for source in ranks]
        computed = [e for e in experts if any(owners[source][e] == rank for source in ranks)]
        loads = [sum(counts[source][e] for source in ranks if owners[source][e] == rank) for e in computed]
        by_destination = sorted(experts, key=lambda e: (mine[e], e))
        order = np.concatenate([np.arange(ends[e], ends[e + 1]) for e in by_destination])
        return cls(sent, received, loads, torch.from_numpy(order))


def spread_experts(model: Decoder, mesh: Mesh, layout: str) -> None:
    """Give a model that is equal on all ranks its exchange, and leave each rank its part of every stack of experts.

    Raises:
        ConfigError: ``ep`` does not divide the experts of every group.
    """
    experts = model.spec.experts
    ep, cp = mesh.sizes.ep, mesh.cp_size
    if not experts.groups or max(ep, cp) == 1:
        return
    group = mesh.cp_group if cp >= ep else mesh.experts.get_group("ep")
    placement = Placement(experts.groups, max(cp, ep), ep, experts.pool)
    model.control.exchange = ShardedExchange(group, cp, layout, placement)
    if ep == 1:
        return
    for stack in model.modules():
        if isinstance(stack, ExpertStack):
            for name, whole in list(stack.named_parameters()):
                part = whole.detach().chunk(ep)[mesh.experts.get_local_rank("ep")].clone()
                sharded = DTensor.from_local(part, mesh.experts["ep"], [Shard(0)], run_check=False)
                setattr(stack, name, nn.Parameter(sharded, requires_grad=whole.requires_grad))

"""What the inputs, blocks and sums of a schedule are made of, forward and backward.

Shapes: queries ``[batch, Sq, heads, D]``, keys and values ``[batch, Sk, kv_heads, D]``, lse and delta
``[batch, Sq, heads]``. lse and delta travel in the dtype of accumulation (fp32), partial outputs in the dtype of the
queries, each rounded once; gradients travel in the dtype of accumulation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fused.block import accumulation_dtype, block_backward, block_forward
from fused.mask import BlockMask
from fused.merge import merge_
from parallel.ring.schedule import INPUTS, Compute, Kind, Message, Parts, Problem
from parallel.ring.sums import Sum, add_plain, narrow

Masks = Callable[[Compute], BlockMask]
Key = tuple[Kind, int]


class Shards(NamedTuple):
    """The tensors of a call that this rank owns."""

    q: Tensor
    k: Tensor
    v: Tensor


class Wire(NamedTuple):
    """A tensor on the wire: shaped like one of ours, without the head dim if ``scalar``."""

    like: Tensor
    dtype: torch.dtype
    scalar: bool = False


class Worker(ABC):
    """Inputs and sums by kind and owner, and what a block does with them."""

    empty: dict[Kind, tuple[float, ...]]

    def __init__(self, problem: Problem, rank: int, shards: Shards, masks: Masks, scale: float) -> None:
        self.rank, self.shards, self.masks, self.scale = rank, shards, masks, scale
        self.whole = problem.whole
        self.wide = accumulation_dtype(shards.q.dtype)
        self.inputs: dict[Key, tuple[Parts, list[Tensor]]] = {("keys", rank): (self.whole, [shards.k, shards.v])}
        self.sums: dict[Key, Sum] = {}

    @abstractmethod
    def wire(self, kind: Kind) -> list[Wire]:
        """The tensors that a message of this kind is made of."""

    @abstractmethod
    def compute(self, block: Compute) -> None:
        """Compute a block and add it to the sums of its owners."""

    def add(self, total: list[Tensor], part: list[Tensor]) -> None:
        add_plain(total, part)

    def room(self, message: Message) -> list[Tensor]:
        """Empty tensors to receive a message into."""
        rooms: list[Tensor] = []
        for like, dtype, scalar in self.wire(message.kind):
            tokens = like.shape[1] // len(self.whole) * len(message.parts)
            rest = like.shape[2:3] if scalar else like.shape[2:]
            rooms.append(torch.empty((like.shape[0], tokens, *rest), dtype=dtype, device=like.device))
        return rooms

    def input(self, kind: Kind, owner: int, parts: Parts) -> list[Tensor]:
        held, tensors = self.inputs[kind, owner]
        return narrow(tensors, held, parts)

    def outgoing(self, message: Message) -> list[Tensor]:
        """Contiguous tensors to send. An input stays, a sum leaves this rank."""
        if message.kind in INPUTS:
            return [x.contiguous() for x in self.input(message.kind, message.owner, message.parts)]
        total = self.sums.pop((message.kind, message.owner))
        tensors = narrow(total.tensors, total.parts, message.parts)
        return [x.to(w.dtype).contiguous() for x, w in zip(tensors, self.wire(message.kind), strict=True)]

    def add_to_sum(self, kind: Kind, owner: int, parts: Parts, tensors: list[Tensor]) -> None:
        key: Key = (kind, owner)
        if key in self.sums:
            self.sums[key].add(parts, tensors)
        else:
            self.sums[key] = Sum(parts, [x.to(self.wide) for x in tensors], self.add, self.empty[kind])

    def running(self, kind: Kind, owner: int, parts: Parts) -> list[Tensor] | None:
        """Where a block can add in place, if there is such a place."""
        total = self.sums.get((kind, owner))
        return None if total is None else total.view(parts)


class Forward(Worker):
    """Sums of ``out`` and its lse."""

    empty = {"out": (0.0, -torch.inf)}  # noqa: RUF012 (never written to)

    def __init__(self, problem: Problem, rank: int, shards: Shards, masks: Masks, scale: float) -> None:
        super().__init__(problem, rank, shards, masks, scale)
        self.inputs["query", rank] = (self.whole, [shards.q])

    def wire(self, kind: Kind) -> list[Wire]:
        q, k, v = self.shards
        if kind == "query":
            return [Wire(q, q.dtype)]
        if kind == "keys":
            return [Wire(k, k.dtype), Wire(v, v.dtype)]
        return [Wire(q, q.dtype), Wire(q, self.wide, scalar=True)]

    def compute(self, block: Compute) -> None:
        (q,) = self.input("query", block.queries, block.query_parts)
        k, v = self.input("keys", block.keys, block.key_parts)
        place = self.running("out", block.queries, block.query_parts)
        into = None if place is None else (place[0], place[1])
        out, lse = block_forward(q, k, v, self.masks(block), self.scale, into)
        if into is None:
            self.add_to_sum("out", block.queries, block.query_parts, [out, lse])

    def add(self, total: list[Tensor], part: list[Tensor]) -> None:
        merge_(total[0], total[1], part[0], part[1])

    def result(self) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of our own queries, both in the dtype of accumulation."""
        out, lse = self.sums.pop(("out", self.rank)).tensors
        return out, lse


class Backward(Worker):
    """Sums of gradients, from the output's gradient, the global lse and delta."""

    empty = {"dquery": (0.0,), "dkeys": (0.0, 0.0)}  # noqa: RUF012 (never written to)

    def __init__(
        self,
        problem: Problem,
        rank: int,
        shards: Shards,
        masks: Masks,
        scale: float,
        upstream: tuple[Tensor, Tensor, Tensor],
    ) -> None:
        super().__init__(problem, rank, shards, masks, scale)
        self.inputs["query", rank] = (self.whole, [shards.q, *upstream])  # d_out, lse, delta

    def wire(self, kind: Kind) -> list[Wire]:
        q, k, v = self.shards
        if kind == "query":
            statistic = Wire(q, self.wide, scalar=True)
            return [Wire(q, q.dtype), Wire(q, q.dtype), statistic, statistic]
        if kind == "keys":
            return [Wire(k, k.dtype), Wire(v, v.dtype)]
        if kind == "dquery":
            return [Wire(q, self.wide)]
        return [Wire(k, self.wide), Wire(v, self.wide)]

    def compute(self, block: Compute) -> None:
        q, d_out, lse, delta = self.input("query", block.queries, block.query_parts)
        k, v = self.input("keys", block.keys, block.key_parts)
        dq_place = self.running("dquery", block.queries, block.query_parts)
        dkv_place = self.running("dkeys", block.keys, block.key_parts)
        dq, dk, dv = block_backward(
            *(q, k, v, d_out, lse, delta, self.masks(block), self.scale),
            dq=None if dq_place is None else dq_place[0],
            dkv=None if dkv_place is None else (dkv_place[0], dkv_place[1]),
        )
        if dq_place is None:
            self.add_to_sum("dquery", block.queries, block.query_parts, [dq])
        if dkv_place is None:
            self.add_to_sum("dkeys", block.keys, block.key_parts, [dk, dv])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` of our own shards, in the dtype of accumulation."""
        (dq,) = self.sums.pop(("dquery", self.rank)).tensors
        dk, dv = self.sums.pop(("dkeys", self.rank)).tensors
        return dq, dk, dv

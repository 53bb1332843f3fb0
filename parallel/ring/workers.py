"""What the inputs, blocks and sums of a schedule are made of, forward and backward.

Shapes: queries ``[batch, Sq, heads, D]``, keys ``[batch, Sk, kv_heads, D]``, values ``[batch, Sk, kv_heads, Dv]``, lse
and delta ``[batch, Sq, heads]``. lse, delta and gradients travel in the dtype of accumulation (fp32), so do results
that others are still added to; a partial output on its way home travels in the dtype of the queries, rounded once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fused.block import accumulation_dtype, block_backward, block_forward
from fused.dropout import Dropout
from fused.merge import merge_
from parallel.ring.check import side_of
from parallel.ring.problem import Heads, Segments
from parallel.ring.scene import Scene
from parallel.ring.schedule import INPUTS, Compute, Kind, Message
from parallel.ring.sums import Sum, add_plain, select, spans

_DELTA_ROWS = 256  # tokens


class Shards(NamedTuple):
    """The tensors of a call that this rank owns."""

    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Rules:
    """The arithmetic of a call."""

    scene: Scene
    rank: int
    scale: float
    dropout: Dropout | None = None


class _Held(NamedTuple):
    """An input at hand: which part of its shard, and the tensors."""

    segments: Segments
    heads: Heads
    tensors: list[Tensor]


class Worker(ABC):
    """Inputs and sums by kind and owner, and what a block does with them."""

    empty: dict[Kind, tuple[float, ...]]  # what each tensor of a sum holds before anything is added

    def __init__(self, rules: Rules, shards: Shards) -> None:
        self.rules, self.shards, self.problem = rules, shards, rules.scene.problem
        self.wide = accumulation_dtype(shards.q.dtype)
        self._inputs: dict[tuple[Kind, int], dict[Message | None, _Held]] = {}
        self._sums: dict[tuple[Kind, int, Heads], Sum] = {}
        self._own("keys", [shards.k, shards.v])

    def _own(self, kind: Kind, tensors: list[Tensor]) -> None:
        rank = self.rules.rank
        held = _Held(self.problem.whole(side_of(kind), rank), self.problem.heads, tensors)
        self._inputs[kind, rank] = {None: held}

    @abstractmethod
    def wire(self, message: Message) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """What a message is made of: of each tensor the dims after ``[batch, tokens]``, and the dtype."""

    @abstractmethod
    def compute(self, block: Compute) -> None:
        """Compute a block and add it to the sums of its owners."""

    def merge(self, total: list[Tensor], part: list[Tensor]) -> None:
        add_plain(total, part)

    def _lengths(self, kind: Kind, owner: int) -> list[int]:
        return [len(run) for run in self.problem.parts(side_of(kind))[owner]]

    def _tensor_heads(self, kind: Kind, heads: Heads) -> Heads:
        """The heads of a kind's tensors that belong to some query heads."""
        return self.problem.key_heads(heads) if side_of(kind) == "keys" else heads

    def room(self, message: Message) -> list[Tensor]:
        """Empty tensors to receive a message into."""
        like = self.shards.q
        tokens = self.problem.tokens(side_of(message.kind), message.owner, message.segments)
        return [
            torch.empty((like.shape[0], tokens, *shape), dtype=dtype, device=like.device)
            for shape, dtype in self.wire(message)
        ]

    def take_in(self, message: Message, tensors: list[Tensor]) -> None:
        """Keep an input that has arrived."""
        held = _Held(message.segments, message.heads, tensors)
        self._inputs.setdefault((message.kind, message.owner), {})[message] = held

    def drop(self, message: Message) -> None:
        """Let go of an input of another rank."""
        del self._inputs[message.kind, message.owner][message]

    def input(self, kind: Kind, owner: int, segments: Segments, heads: Heads) -> list[Tensor]:
        """Part of a shard at hand; views where it lies side by side in one message."""
        lengths = self._lengths(kind, owner)
        pieces: dict[int, list[Tensor]] = {}
        for held in self._inputs[kind, owner].values():
            some = tuple(segment for segment in segments if segment in held.segments and segment not in pieces)
            if not some or not held.heads.covers(heads):
                continue
            there, wanted = self._tensor_heads(kind, held.heads), self._tensor_heads(kind, heads)
            tensors = held.tensors
            if there != wanted:
                tensors = [x.narrow(2, wanted.start - there.start, len(wanted)) for x in tensors]
            if some == segments:
                return select(tensors, spans(lengths, held.segments, some))
            pieces |= {segment: select(tensors, spans(lengths, held.segments, (segment,))) for segment in some}
        return [torch.cat(parts, 1) for parts in zip(*(pieces[segment] for segment in segments), strict=True)]

    def outgoing(self, message: Message) -> list[Tensor]:
        """Contiguous tensors to send. An input stays, a sum leaves this rank."""
        if message.kind in INPUTS:
            tensors = self.input(message.kind, message.owner, message.segments, message.heads)
        else:
            key = (message.kind, message.owner, message.heads)
            tensors = self._sums[key].take(message.segments)
            if not self._sums[key].segments:
                del self._sums[key]
        # Not strict: an input may have a tensor more, which stays at home.
        return [x.to(dtype).contiguous() for x, (_, dtype) in zip(tensors, self.wire(message), strict=False)]

    def add(self, kind: Kind, owner: int, segments: Segments, heads: Heads, tensors: list[Tensor]) -> None:
        """Add to a sum, or begin it."""
        total = self._sums.get((kind, owner, heads))
        if total is not None:
            total.add(segments, tensors)
            return
        wide = [x.to(self.wide) for x in tensors]
        self._sums[kind, owner, heads] = Sum(self._lengths(kind, owner), segments, wide, self.merge, self.empty[kind])

    def running(self, kind: Kind, owner: int, segments: Segments, heads: Heads) -> list[Tensor] | None:
        """Where a block can add in place, if there is such a place."""
        total = self._sums.get((kind, owner, heads))
        return None if total is None else total.view(segments)

    def own_sum(self, kind: Kind, likes: list[tuple[int, ...]]) -> list[Tensor]:
        """The sum over everything for our own shard; ``likes`` are the shapes of its tensors."""
        rank, whole = self.rules.rank, self.problem.whole(side_of(kind), self.rules.rank)
        sums = {key[2]: self._sums.pop(key) for key in list(self._sums) if key[:2] == (kind, rank)}
        only = sums.get(self.problem.heads)
        if only is not None and len(sums) == 1 and only.segments == whole:
            return only.tensors
        tensors = [
            self.shards.q.new_full(shape, value, dtype=self.wide)
            for shape, value in zip(likes, self.empty[kind], strict=True)
        ]
        for heads, part in sums.items():
            mine = self._tensor_heads(kind, heads)
            sliced = [x.narrow(2, mine.start, len(mine)) for x in tensors]
            Sum(self._lengths(kind, rank), whole, sliced, self.merge, self.empty[kind]).add(part.segments, part.tensors)
        return tensors

    def dropout(self, block: Compute) -> Dropout | None:
        return None if self.rules.dropout is None else replace(self.rules.dropout, head=block.heads.start)


class Forward(Worker):
    """Sums of ``out`` and its lse."""

    empty = {"out": (0.0, -torch.inf)}  # noqa: RUF012 (never written to)

    def __init__(self, rules: Rules, shards: Shards) -> None:
        super().__init__(rules, shards)
        self._own("query", [shards.q])

    def wire(self, message: Message) -> list[tuple[tuple[int, ...], torch.dtype]]:
        q, k, v = self.shards
        heads = len(self._tensor_heads(message.kind, message.heads))
        if message.kind == "query":
            return [((heads, q.shape[3]), q.dtype)]
        if message.kind == "keys":
            return [((heads, k.shape[3]), k.dtype), ((heads, v.shape[3]), v.dtype)]
        return [((heads, v.shape[3]), self.wide if message.wide else q.dtype), ((heads,), self.wide)]

    def compute(self, block: Compute) -> None:
        (q,) = self.input("query", block.queries, block.query_segments, block.heads)
        k, v = self.input("keys", block.keys, block.key_segments, block.heads)
        place = self.running("out", block.queries, block.query_segments, block.heads)
        into = None if place is None else (place[0], place[1])
        mask = self.rules.scene.block_mask(block)
        out, lse = block_forward(q, k, v, mask, self.rules.scale, into, self.dropout(block))
        if into is None:
            self.add("out", block.queries, block.query_segments, block.heads, [out, lse])

    def merge(self, total: list[Tensor], part: list[Tensor]) -> None:
        merge_(total[0], total[1], part[0], part[1])

    def result(self) -> tuple[Tensor, Tensor]:
        """``(out, lse)`` of our own queries, both in the dtype of accumulation."""
        shape = (*self.shards.q.shape[:3], self.shards.v.shape[3])
        out, lse = self.own_sum("out", [shape, shape[:3]])
        return out, lse


def delta_of(out: Tensor, d_out: Tensor) -> Tensor:
    """``rowsum(out * d_out)`` in the dtype of accumulation, some rows at a time: products of all rows at once would be
    fresh memory, which the operating system clears page by page."""
    wide = accumulation_dtype(out.dtype)
    rows = zip(out.split(_DELTA_ROWS, 1), d_out.split(_DELTA_ROWS, 1), strict=True)
    return torch.cat([torch.linalg.vecdot(x.to(wide), y.to(wide)) for x, y in rows], 1)


class Backward(Worker):
    """Sums of gradients, from the output's gradient, the global lse and delta.

    For its own queries a rank has the output besides, which is what a CPU's kernel asks for.
    """

    empty = {"dquery": (0.0,), "dkeys": (0.0, 0.0)}  # noqa: RUF012 (never written to)

    def __init__(self, rules: Rules, shards: Shards, out: Tensor, lse: Tensor, d_out: Tensor) -> None:
        super().__init__(rules, shards)
        self._own("query", [shards.q, d_out, lse, delta_of(out, d_out), out])

    def wire(self, message: Message) -> list[tuple[tuple[int, ...], torch.dtype]]:
        q, k, v = self.shards
        heads = len(self._tensor_heads(message.kind, message.heads))
        if message.kind == "query":
            statistic = ((heads,), self.wide)
            return [((heads, q.shape[3]), q.dtype), ((heads, v.shape[3]), q.dtype), statistic, statistic]
        if message.kind == "dquery":
            return [((heads, q.shape[3]), self.wide)]
        dtype = k.dtype if message.kind == "keys" else self.wide
        return [((heads, k.shape[3]), dtype), ((heads, v.shape[3]), dtype)]

    def compute(self, block: Compute) -> None:
        q, d_out, lse, delta, *out = self.input("query", block.queries, block.query_segments, block.heads)
        k, v = self.input("keys", block.keys, block.key_segments, block.heads)
        dq_place = self.running("dquery", block.queries, block.query_segments, block.heads)
        dkv_place = self.running("dkeys", block.keys, block.key_segments, block.heads)
        dq, dk, dv = block_backward(
            *(q, k, v, d_out, lse, delta, self.rules.scene.block_mask(block), self.rules.scale),
            dq=None if dq_place is None else dq_place[0],
            dkv=None if dkv_place is None else (dkv_place[0], dkv_place[1]),
            dropout=self.dropout(block),
            out=out[0] if out else None,
        )
        if dq_place is None:
            self.add("dquery", block.queries, block.query_segments, block.heads, [dq])
        if dkv_place is None:
            self.add("dkeys", block.keys, block.key_segments, block.heads, [dk, dv])

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` of our own shards, in the dtype of accumulation."""
        q, k, v = self.shards
        (dq,) = self.own_sum("dquery", [tuple(q.shape)])
        dk, dv = self.own_sum("dkeys", [tuple(k.shape), tuple(v.shape)])
        return dq, dk, dv

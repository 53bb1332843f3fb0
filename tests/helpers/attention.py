"""Attention cases and their fp64 oracle, and a way to run all ranks of one in a single process."""

import queue
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from fused.dropout import Dropout
from fused.mask import CAUSAL, Mask
from parallel.layout import Layout, balanced, named_layout
from parallel.ring import engine
from parallel.ring.channel import Arrival, Parcels
from parallel.ring.scene import Scene
from parallel.ring.workers import Rules, Shards
from parallel.strategies import find_strategy
from tests.helpers.masks import dense_mask


@dataclass(frozen=True)
class Case:
    """One attention problem; everything about it follows from these fields."""

    strategy: str
    ranks: int
    layout: str = "zigzag"
    mask: Mask = CAUSAL
    heads: int = 4
    kv_heads: int = 2
    documents: str = "none"  # none, random, padded or single: of one token each
    keys: int = 53
    queries: int | None = None  # the last of as many tokens as there are keys; None: all
    batch: int = 2
    head_dim: int = 8
    value_dim: int = 8
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class Tensors:
    """Whole-sequence inputs ``[batch, seq, heads, head_dim]`` and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    documents: Tensor | None


@dataclass(frozen=True)
class Answer:
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor

    def named(self) -> dict[str, Tensor]:
        return {"out": self.out, "lse": self.lse, "dq": self.dq, "dk": self.dk, "dv": self.dv}


def layouts(case: Case, documents: Tensor | None) -> tuple[Layout, Layout]:
    """Of the queries and of the keys."""
    if case.layout == "balanced":
        assert documents is not None, "there is something to balance by"
        layout = balanced(documents, case.ranks, case.mask)
        return layout, layout
    if case.layout == "lopsided":  # some ranks hold nothing, others one token
        cuts = [*[0, 0, 1, case.keys // 2, *([case.keys] * case.ranks)][: case.ranks], case.keys]
        layout = Layout.of([[cut] for cut in pairwise(cuts)])
        return layout, layout
    keys = named_layout(case.layout, case.keys, case.ranks)
    if case.queries is None:
        return keys, keys
    return named_layout(case.layout, case.queries, case.ranks).shifted(case.keys - case.queries), keys


@cache
def make(case: Case) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    queries = case.keys if case.queries is None else case.queries

    def normal(seq: int, heads: int, width: int) -> Tensor:
        return torch.randn(case.batch, seq, heads, width, generator=generator).to(case.dtype)

    documents = None
    if case.documents != "none":
        share = 1.0 if case.documents == "single" else 0.06  # else lengths from 1 to well over a shard
        documents = (torch.rand(case.batch, case.keys, generator=generator) < share).cumsum(1)
    if case.documents == "padded" and documents is not None:
        for row in range(case.batch):
            documents[row, case.keys - case.keys // 3 - row :] = -1
    q = normal(queries, case.heads, case.head_dim)
    k, v = (normal(case.keys, case.kv_heads, width) for width in (case.head_dim, case.value_dim))
    return Tensors(q, k, v, normal(queries, case.heads, case.value_dim), documents)


def oracle(case: Case, tensors: Tensors | None = None) -> Answer:
    """The same attention in fp64 from its definition: scores, mask, softmax, autograd."""
    tensors = make(case) if tensors is None else tensors
    q, k, v = (x.double().requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    group = case.heads // case.kv_heads
    keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    ids = None if tensors.documents is None else tensors.documents.numpy()
    first = k.shape[1] - q.shape[1]
    visible = torch.from_numpy(dense_mask(case.mask, k.shape[1], ids)[:, first:]).unsqueeze(1)
    scores = scores.masked_fill(~visible, -torch.inf)
    weights = torch.where(visible, scores.softmax(-1), 0.0)  # a row that sees nothing is 0, not NaN
    if case.dropout > 0:
        positions = torch.arange(k.shape[1])
        weights = weights * Dropout(case.dropout, 7).factors(case.batch, case.heads, positions[first:], positions)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, values)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), tensors.d_out.double())
    lse = scores.logsumexp(-1).transpose(1, 2)
    return Answer(out.detach(), lse.detach(), *(x.nan_to_num(0.0) for x in (dq, dk, dv)))


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The largest error relative to the largest exact value (at least 1, so that a bound can be absolute too)."""
    assert torch.equal(ours.isinf(), exact.isinf()), "infinite in other places"
    assert not ours.isnan().any(), "not a number"
    difference = torch.where(exact.isinf(), 0.0, ours.double() - exact)
    if difference.numel() == 0:
        return 0.0
    return (difference.abs().max() / exact.masked_fill(exact.isinf(), 0.0).abs().max().clamp_min(1.0)).item()


class _Mail:
    """What is on its way between the ranks of one process: for each directed link a queue."""

    def __init__(self, ranks: int) -> None:
        self.links = {(a, b): queue.SimpleQueue[Tensor]() for a in range(ranks) for b in range(ranks)}
        self.bytes = dict.fromkeys(self.links, 0)


@dataclass
class _Delivery:
    tensor: Tensor
    link: "queue.SimpleQueue[Tensor]"

    def wait(self) -> Tensor:
        self.tensor.copy_(self.link.get(timeout=20))
        return self.tensor


@dataclass
class MemoryChannel:
    """A channel between threads. What is sent is copied, as on a wire."""

    rank: int
    mail: _Mail
    waiting: dict[int, list[Arrival]] = field(default_factory=dict)

    @property
    def early(self) -> bool:
        return True

    def receive(self, peer: int, tensors: Sequence[Tensor]) -> list[Arrival]:
        found: list[Arrival] = []
        for tensor in tensors:
            arrival = _InOrder(_Delivery(tensor, self.mail.links[peer, self.rank]), self.waiting.setdefault(peer, []))
            self.waiting[peer].append(arrival)
            found.append(arrival)
        return found

    def send(self, parcels: Parcels) -> None:
        for peer, tensor in parcels:
            assert tensor.is_contiguous(), "sent as it lies in memory"
            self.mail.bytes[self.rank, peer] += tensor.numel() * tensor.element_size()
            self.mail.links[self.rank, peer].put(tensor.clone())

    def finish_sends(self, keep: int = 0) -> None:
        pass


@dataclass
class _InOrder:
    """Receives from one peer complete in the order in which they were posted, whichever is waited for first."""

    delivery: _Delivery
    line: list[Arrival]

    def wait(self) -> Tensor:
        if self in self.line:
            for earlier in self.line[: self.line.index(self) + 1]:
                assert isinstance(earlier, _InOrder)
                earlier.delivery.wait()
            del self.line[: self.line.index(self) + 1]
        return self.delivery.tensor

    def __eq__(self, other: object) -> bool:
        return self is other


def run_in_memory(case: Case) -> tuple[Answer, dict[tuple[int, int], int]]:
    """All ranks of a case as threads, forward and backward: the whole answer, and the bytes of every directed link."""
    tensors, strategy = make(case), find_strategy(case.strategy)
    queries, keys = layouts(case, tensors.documents)
    ids = None if tensors.documents is None else tensors.documents.numpy().astype(np.int64)
    scene = Scene(queries, keys, case.mask, case.heads, case.kv_heads, ids)
    mail = _Mail(case.ranks)
    answers: dict[int, Answer] = {}
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    dropout = Dropout(case.dropout, 7) if case.dropout > 0 else None
    strategy.forward(scene.problem)
    strategy.backward(scene.problem)

    def work(rank: int) -> None:
        shards = Shards(queries.shard(tensors.q, 1, rank), *(keys.shard(x, 1, rank) for x in (tensors.k, tensors.v)))
        rules, channel = Rules(scene, rank, scale, dropout), MemoryChannel(rank, mail)
        out, lse = engine.forward(strategy, rules, shards, channel)
        d_out = queries.shard(tensors.d_out, 1, rank)
        answers[rank] = Answer(out, lse, *engine.backward(strategy, rules, shards, out, lse, d_out, channel))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(case.ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == case.ranks, "a rank has failed; its traceback is above"
    sides = {"out": queries, "lse": queries, "dq": queries, "dk": keys, "dv": keys}
    whole = {
        name: side.unshard([answers[rank].named()[name] for rank in range(case.ranks)], 1)
        for name, side in sides.items()
    }
    return Answer(**whole), mail.bytes


def errors(ours: Answer, exact: Answer) -> dict[str, float]:
    return {name: relative_error(x, exact.named()[name]) for name, x in ours.named().items()}

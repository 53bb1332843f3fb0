"""Attention cases and their fp64 oracle, for the tests of sequence parallelism."""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One attention problem; everything about it follows from these fields."""

    strategy: str
    layout: str
    causal: bool
    heads: int
    kv_heads: int
    documents: str  # none, random or padded
    local_seq: int
    batch: int = 2
    head_dim: int = 12
    dtype: torch.dtype = torch.float32
    scale: float | None = None


@dataclass(frozen=True)
class Tensors:
    """Whole-sequence inputs ``[batch, seq, heads, head_dim]`` and the gradient of the output."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    document_ids: Tensor | None


@dataclass(frozen=True)
class Answer:
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def cases(world_size: int) -> list[Case]:
    """Every strategy that can run on so many ranks, in every layout, mask, head grouping and document pattern."""
    strategies = ["ring", "token_ring"] + (["local"] if world_size == 1 else [])
    grid = product(strategies, ["contiguous", "zigzag"], [True, False], [(4, 4), (4, 2), (3, 1)], ["none", "random"])
    return [
        Case(strategy, layout, causal, heads, kv_heads, documents, 26 if layout == "zigzag" else 23)
        for strategy, layout, causal, (heads, kv_heads), documents in grid
    ]


def make(case: Case, world_size: int, seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    seq = case.local_seq * world_size

    def normal(heads: int) -> Tensor:
        return torch.randn(case.batch, seq, heads, case.head_dim, generator=generator).to(case.dtype)

    documents = None
    if case.documents != "none":
        starts = torch.rand(case.batch, seq, generator=generator) < 0.06  # lengths from 1 to well over a shard
        documents = starts.cumsum(1)
    if case.documents == "padded" and documents is not None:
        for row in range(case.batch):
            documents[row, seq - seq // 3 - row :] = -1
    return Tensors(normal(case.heads), normal(case.kv_heads), normal(case.kv_heads), normal(case.heads), documents)


def oracle(case: Case, tensors: Tensors) -> Answer:
    """The same attention in fp64 from its definition: scores, mask, softmax, autograd."""
    q, k, v = (x.double().requires_grad_() for x in (tensors.q, tensors.k, tensors.v))
    group = case.heads // case.kv_heads
    keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * scale
    seq = q.shape[1]
    visible = torch.ones(1, 1, seq, seq, dtype=torch.bool)
    if case.causal:
        visible = visible.tril()
    if tensors.document_ids is not None:
        ids = tensors.document_ids
        visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
    scores = scores.masked_fill(~visible, -torch.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), values)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), tensors.d_out.double())
    return Answer(out.detach(), scores.logsumexp(-1).transpose(1, 2).detach(), dq, dk, dv)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """The largest error relative to the largest exact value (at least 1, so that a bound can be absolute too)."""
    assert torch.isfinite(ours).all(), "not finite"
    return ((ours.double() - exact).abs().max() / exact.abs().max().clamp_min(1.0)).item()

"""Attention over ranks as a torch operator, so that torch.compile, checkpointing and autograd know it as one node.

An operator takes tensors and numbers only; everything else about a call is kept in a table and passed by its place
there.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _resolve_process_group  # what torch's own operators on groups use
from torch.distributed.distributed_c10d import GroupName

from conf.errors import ConfigError
from fused.block import accumulation_dtype
from fused.dropout import Dropout
from fused.mask import Mask
from parallel.agreement import check_agreement
from parallel.layout import Layout, named_layout
from parallel.ring import engine
from parallel.ring.channel import GroupChannel
from parallel.ring.documents import scene_of
from parallel.ring.schedule import Strategy
from parallel.ring.workers import Rules, Shards

_KEPT_CALLS = 1 << 14


@dataclass(frozen=True)
class Call:
    """Everything about an attention call but its tensors. A layout by name is even over the ranks."""

    strategy: Strategy
    group: str | None  # the name of a process group; None: one rank
    layout: str | Layout
    key_layout: str | Layout
    mask: Mask
    scale: float | None
    dropout: float
    timeout: float

    def process_group(self) -> dist.ProcessGroup | None:
        return None if self.group is None else _resolve_process_group(GroupName(self.group))


_places: "OrderedDict[Call, int]" = OrderedDict()
_calls: dict[int, Call] = {}
_next = count()


def place_of(call: Call) -> int:
    """The call's place in the table; the oldest of very many calls are forgotten."""
    if call not in _places:
        if len(_places) == _KEPT_CALLS:
            del _calls[_places.popitem(last=False)[1]]
        _places[call] = next(_next)
        _calls[_places[call]] = call
    return _places[call]


def _layout(named: str | Layout, tokens: int, ranks: int) -> Layout:
    if isinstance(named, Layout):
        return named
    return named_layout(named if ranks > 1 else "contiguous", tokens * ranks, ranks)


def _check_shapes(shards: Shards, documents: Tensor | None, queries: Layout, keys: Layout, rank: int) -> None:
    q, k, v = shards
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if k.shape[:3] != v.shape[:3]:
        raise ConfigError("attend", shapes, "k and v agree in all but the head_dim", "project both to the same heads")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ConfigError("attend", shapes, "q and k agree in batch and head_dim", "pass one rank's shard of all three")
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ConfigError("attend", shapes, "k's heads divide q's heads", "repeat or drop key-value heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        raise ConfigError("attend", dtypes, "one floating-point dtype", "cast k and v to q's dtype")
    if not q.device == k.device == v.device:
        raise ConfigError("attend", f"{q.device}, {k.device}, {v.device}", "one device", "move k and v to q's device")
    lengths = (queries.lengths[rank], keys.lengths[rank])
    if (q.shape[1], k.shape[1]) != lengths:
        rule = f"rank {rank} of the layout holds {lengths[0]} queries and {lengths[1]} keys"
        raise ConfigError("attend", shapes, rule, "layout.shard(x, 1, rank)")
    if documents is not None:
        if documents.shape != k.shape[:2]:
            rule = f"shaped as the keys, [batch, local_keys] = {list(k.shape[:2])}"
            raise ConfigError("document_ids", list(documents.shape), rule, "shard them too")
        if documents.is_floating_point() or documents.dtype == torch.bool:
            raise ConfigError("document_ids", documents.dtype, "integers", "document_ids.long()")


def _agree(call: Call, shards: Shards, documents: Tensor | None, seed: int) -> tuple[Layout, Layout]:
    """The layouts of a call that all ranks make alike and whose tensors fit; an error on all of them if not."""
    q, k, v = shards
    group = call.process_group()
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    failure: ConfigError | None = None
    queries = keys = None
    try:
        if not q.dim() == k.dim() == v.dim() == 4:
            shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
            raise ConfigError("attend", shapes, "all are [batch, local_seq, heads, head_dim]", "add the missing dims")
        queries, keys = _layout(call.layout, q.shape[1], size), _layout(call.key_layout, k.shape[1], size)
        if len(queries.ranks) != size or len(keys.ranks) != size:
            found = f"{len(queries.ranks)} and {len(keys.ranks)} ranks"
            raise ConfigError("layout", found, f"it has the {size} ranks of the group", "make it for this group")
        _check_shapes(shards, documents, queries, keys, rank)
    except ConfigError as error:
        failure = error
    if group is not None and size > 1:
        description = (
            ("tensors", "fit" if failure is None else "do not fit"),
            ("q", f"{(q.shape[0], *q.shape[2:])} {q.dtype}"),
            ("k and v", f"{k.shape[2:]} {v.shape[2:]} {k.dtype}"),
            ("layout", f"{queries} {keys}"),
            ("call", f"{call.strategy.name} {call.mask} {call.scale} {call.dropout} {seed} {documents is not None}"),
        )
        check_agreement(group, q.device, description, call.timeout)
    if failure is not None:
        raise failure
    assert queries is not None, "there is a failure otherwise"
    assert keys is not None, "there is a failure otherwise"
    return queries, keys


def _rules(
    call: Call, shards: Shards, documents: Tensor | None, seed: int, queries: Layout, keys: Layout
) -> tuple[Rules, GroupChannel | None]:
    q, k, _ = shards
    group = call.process_group()
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    scene = scene_of(queries, keys, call.mask, (q.shape[2], k.shape[2]), documents, group)
    scale = 1.0 / math.sqrt(q.shape[3]) if call.scale is None else call.scale
    dropout = Dropout(call.dropout, seed) if call.dropout > 0 else None
    channel = GroupChannel(group, q.device, call.timeout) if group is not None and size > 1 else None
    return Rules(scene, rank, scale, dropout), channel


@torch.library.custom_op("sundog::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, place: int, seed: int
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of this rank's queries over all ranks' keys; differentiable through ``out``.

    The backward pass communicates: all ranks must take it, in the same order.
    """
    call = _calls[place]
    shards = Shards(q.contiguous(), k.contiguous(), v.contiguous())
    queries, keys = _agree(call, shards, documents, seed)
    rules, channel = _rules(call, shards, documents, seed, queries, keys)
    out, lse = engine.forward(call.strategy, rules, shards, channel)
    return out.contiguous(), lse.contiguous()


@attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, place: int, seed: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


@torch.library.custom_op("sundog::attention_backward", mutates_args=())
def attention_backward(
    tensors: list[Tensor], d_out: Tensor, documents: Tensor | None, place: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` from ``[q, k, v, out, lse]`` and the gradient of ``out``."""
    call = _calls[place]
    q, k, v, out, lse = tensors
    shards = Shards(q.contiguous(), k.contiguous(), v.contiguous())
    size = 1 if call.group is None else dist.get_world_size(call.process_group())
    layouts = _layout(call.layout, q.shape[1], size), _layout(call.key_layout, k.shape[1], size)
    rules, channel = _rules(call, shards, documents, seed, *layouts)
    d_out = d_out.to(q.dtype).contiguous()
    dq, dk, dv = engine.backward(call.strategy, rules, shards, out, lse, d_out, channel)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@attention_backward.register_fake
def _(
    tensors: list[Tensor], d_out: Tensor, documents: Tensor | None, place: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, _ = tensors
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, documents, ctx.place, ctx.seed = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, *output, documents)


def _differentiate(ctx: Any, d_out: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, documents = ctx.saved_tensors
    gradients = attention_backward(tensors, d_out, documents, ctx.place, ctx.seed)
    return (*gradients, None, None, None)


attention.register_autograd(_differentiate, setup_context=_save)

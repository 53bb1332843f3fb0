"""Attention over a sequence that is split over the ranks of a process group."""

import math
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import ConfigError
from conf.rules import nearest
from parallel.agreement import check_agreement
from parallel.layout import LAYOUTS
from parallel.ring import local, ring, token_ring
from parallel.ring.engine import Call, attention
from parallel.ring.masks import block_masks
from parallel.ring.schedule import Problem, Strategy

STRATEGIES: dict[str, Strategy] = {s.name: s for s in (local.STRATEGY, ring.STRATEGY, token_ring.STRATEGY)}


def find_strategy(name: str) -> Strategy:
    """The strategy of that name.

    Raises:
        ConfigError: there is none; the message names the known ones and the nearest.
    """
    if name not in STRATEGIES:
        known = tuple(STRATEGIES)
        raise ConfigError("strategy", name, f"one of {', '.join(known)}", nearest(name, known))
    return STRATEGIES[name]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, document_ids: Tensor | None, layout: str, world_size: int) -> None:
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4:
        raise ConfigError("attend", shapes, "all are [batch, local_seq, heads, head_dim]", "add the missing dims")
    if k.shape != v.shape:
        raise ConfigError("attend", shapes, "k and v have one shape", "project both to the same heads and head_dim")
    if q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ConfigError("attend", shapes, "q and k agree in all but the heads", "pass one rank's shard of all three")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] != 0:
        raise ConfigError("attend", shapes, "k's heads divide q's heads", "repeat or drop key-value heads")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        dtypes = f"q {q.dtype}, k {k.dtype}, v {v.dtype}"
        raise ConfigError("attend", dtypes, "one floating-point dtype", "cast k and v to q's dtype")
    if not q.device == k.device == v.device:
        raise ConfigError("attend", f"{q.device}, {k.device}, {v.device}", "one device", "move k and v to q's device")
    if q.shape[1] == 0 or q.shape[0] == 0:
        raise ConfigError("attend", shapes, "at least one token on every rank", "fewer ranks, or a longer sequence")
    if layout == "zigzag" and world_size > 1 and q.shape[1] % 2 != 0:
        raise ConfigError(
            "attend", shapes, "a zigzag shard is two equal chunks", "an even local length, or layout=contiguous"
        )
    if document_ids is not None and document_ids.shape != q.shape[:2]:
        raise ConfigError(
            "document_ids",
            list(document_ids.shape),
            f"shaped [batch, local_seq] = {list(q.shape[:2])}",
            "shard them too",
        )
    if document_ids is not None and (document_ids.is_floating_point() or document_ids.dtype == torch.bool):
        raise ConfigError("document_ids", document_ids.dtype, "integers", "document_ids.long()")


def attend_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    strategy: str,
    layout: str,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`attend`, and the log-sum-exp of the scores ``[batch, local_seq, heads]`` (fp32, not differentiable)."""
    chosen = find_strategy(strategy)
    if layout not in LAYOUTS:
        raise ConfigError("layout", layout, f"one of {', '.join(LAYOUTS)}", nearest(layout, LAYOUTS))
    world_size = 1 if group is None else dist.get_world_size(group)
    rank = 0 if group is None else dist.get_rank(group)
    if chosen.single and world_size > 1:
        raise ConfigError(
            "strategy",
            strategy,
            f"it keeps a whole sequence on one rank, the group has {world_size}",
            "strategy=token_ring or ring, or a group of one rank",
        )
    _check_shapes(q, k, v, document_ids, layout, world_size)
    if group is not None and world_size > 1:
        check_agreement(
            group,
            q.device,
            {
                "q": (tuple(q.shape), str(q.dtype)),
                "k": (tuple(k.shape), str(k.dtype)),
                "call": (strategy, layout, causal, document_ids is not None, scale),
            },
        )
    # One rank holds everything in order, whatever the layout: its whole sequence is one chunk.
    problem = Problem(world_size, layout if world_size > 1 else "contiguous", causal)
    masks = block_masks(problem, q.shape[1], document_ids, group)
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    return attention(q, k, v, Call(chosen, problem, rank, group, masks, scale))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup | None,
    strategy: str,
    layout: str,
    causal: bool = True,
    document_ids: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of this rank's queries over the keys of all ranks of ``group``; differentiable.

    Every rank of the group makes the same call on its shard, and takes the backward pass if any does.

    Args:
        q: ``[batch, local_seq, heads, head_dim]``, this rank's shard in the order of ``parallel.layout.positions``.
        k: ``[batch, local_seq, kv_heads, head_dim]``; kv_heads divides heads, query head ``h`` reads key head
            ``h // (heads // kv_heads)``.
        v: shaped like ``k``.
        group: the ranks that share the sequence, in order; None for a sequence that is not split.
        strategy: a key of ``STRATEGIES``.
        layout: which tokens each rank holds, ``contiguous`` or ``zigzag``.
        causal: a token sees the tokens at or before its own position, else all.
        document_ids: ``[batch, local_seq]`` integers; a token sees only tokens with its own id. Negative ids are
            padding, which sees padding. They are gathered over the group once for each tensor object, so pass the
            same tensor to all layers.
        scale: of the scores before the softmax; default ``1 / sqrt(head_dim)``.

    Returns:
        ``[batch, local_seq, heads, head_dim]`` in the dtype of ``q``; softmax, sums and merges are in fp32 (fp64 for
        fp64 inputs).

    Raises:
        ConfigError: an unknown strategy or layout, shapes that do not fit together, or ranks whose calls differ.
    """
    out, _ = attend_with_lse(
        *(q, k, v),
        group=group,
        strategy=strategy,
        layout=layout,
        causal=causal,
        document_ids=document_ids,
        scale=scale,
    )
    return out


class SequenceParallelCore:
    """The attention core that a model is given when its sequences are split: causal :func:`attend` over ``group``."""

    def __init__(self, group: dist.ProcessGroup | None, strategy: str, layout: str) -> None:
        self._attend = partial(attend, group=group, strategy=strategy, layout=layout)

    def __call__(self, q_BSHD: Tensor, k_BSKD: Tensor, v_BSKD: Tensor, document_ids_BS: Tensor | None, /) -> Tensor:
        """See ``models.protocols.AttentionCore``."""
        return self._attend(q_BSHD, k_BSKD, v_BSKD, document_ids=document_ids_BS)

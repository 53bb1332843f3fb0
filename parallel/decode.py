"""Attention of a few new queries over a cache of keys and values that is split over ranks (decode and verification).

It is TokenRing with so few queries that every rank has them already: each computes the queries against its own part of
the cache, and the partial results meet everywhere. Nothing of the cache moves.
"""

import math

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fused.block import block_forward
from fused.mask import CAUSAL, BlockMask, Mask
from fused.merge import merge_
from parallel.layout import Layout


def partial_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Layout, rank: int, mask: Mask = CAUSAL, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of the last ``q.shape[1]`` tokens over the keys that ``rank`` holds, in fp32."""
    length = keys.bounds.stop
    positions = np.arange(length - q.shape[1], length)
    block = BlockMask.of(mask.ranges(positions, length), positions, keys.positions(rank))
    return block_forward(q, k, v, block, 1.0 / math.sqrt(q.shape[3]) if scale is None else scale)


def attend_split_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: dist.ProcessGroup,
    keys: Layout,
    mask: Mask = CAUSAL,
    scale: float | None = None,
) -> Tensor:
    """Attention of the newest tokens over all ranks' keys, the same bits on every rank; no gradients.

    Args:
        q: ``[batch, new, heads, head_dim]``, the last ``new`` tokens of the sequence, equal on all ranks.
        k: ``[batch, local_keys, kv_heads, head_dim]``, this rank's part of the cache, the new tokens' keys included.
        v: ``[batch, local_keys, kv_heads, value_dim]``.
        group: the ranks that share the cache.
        keys: which positions each rank holds; parts may be unequal or empty.
        mask: what a query sees.
        scale: of the scores; default ``1 / sqrt(head_dim)``.
    """
    out, lse = partial_attention(q, k, v, keys, dist.get_rank(group), mask, scale)
    return merge_over_ranks(out, lse, group)[0].to(q.dtype)


def merge_over_ranks(out: Tensor, lse: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` over all ranks' keys from what each rank has over its own, the same bits on every rank.

    ``out`` is ``[..., value_dim]`` and ``lse`` ``[...]``, in fp32; a rank without keys has out 0 and lse -inf.
    """
    mine = torch.cat([out, lse.unsqueeze(-1)], -1)
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    total, total_lse = parts[0][..., :-1].contiguous(), parts[0][..., -1].contiguous()
    for part in parts[1:]:  # in rank order, so that every rank gets the same bits
        merge_(total, total_lse, part[..., :-1], part[..., -1])
    return total, total_lse

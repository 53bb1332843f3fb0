"""Block attention in plain torch: the oracle of every kernel, and what runs where there is no kernel.

It holds the scores of :data:`ROWS` queries at a time.
"""

import torch
from torch import Tensor

from fused.dropout import Dropout
from fused.mask import BlockMask

ROWS = 512


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """``[B, S, H, D] -> [B, Hkv, group, S, D]``: query head ``h`` belongs to key head ``h // group``."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, mask: BlockMask, scale: float, rows: slice) -> Tensor:
    """Masked scores ``[B, Hkv, group, rows, Sk]`` of grouped queries."""
    scores = torch.einsum("bkgqd,bskd->bkgqs", q, k) * scale
    return scores.masked_fill(~mask.dense(q.device)[:, :, rows].unsqueeze(2), -torch.inf)


def _factors(dropout: Dropout | None, scores: Tensor, mask: BlockMask, rows: slice) -> Tensor | float:
    if dropout is None:
        return 1.0
    batch, kv_heads, group = scores.shape[:3]
    queries = torch.from_numpy(mask.query_positions[rows]).to(scores.device)
    keys = torch.from_numpy(mask.key_positions).to(scores.device)
    return dropout.factors(batch, kv_heads * group, queries, keys).unflatten(1, (kv_heads, group)).to(scores.dtype)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """``(out [B, Sq, H, Dv], lse [B, Sq, H])``; a query that sees nothing has out 0 and lse -inf."""
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3])
    for first in range(0, q.shape[1], ROWS):
        rows = slice(first, first + ROWS)
        scores = _scores(_grouped(q[:, rows], k.shape[2]), k, mask, scale, rows)
        total = torch.logsumexp(scores, dim=-1) if k.shape[1] else scores.new_full(scores.shape[:-1], -torch.inf)
        shift = total.masked_fill(total == -torch.inf, 0.0)
        weights = (scores - shift.unsqueeze(-1)).exp() * _factors(dropout, scores, mask, rows)
        out[:, rows] = _ungrouped(torch.einsum("bkgqs,bskd->bkgqd", weights, v))
        lse[:, rows] = _ungrouped(total.unsqueeze(-1)).squeeze(-1)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: BlockMask,
    scale: float,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of ``(dq, dk, dv)``, from the global ``lse`` and ``delta`` (FlashAttention-2, algorithm 2)."""
    heads = k.shape[2]
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for first in range(0, q.shape[1], ROWS):
        rows = slice(first, first + ROWS)
        q_rows, d_rows = _grouped(q[:, rows], heads), _grouped(d_out[:, rows], heads)
        shift = lse[:, rows].masked_fill(lse[:, rows] == -torch.inf, 0.0)
        scores = _scores(q_rows, k, mask, scale, rows)
        p = (scores - _grouped(shift.unsqueeze(-1), heads)).exp()
        factors = _factors(dropout, scores, mask, rows)
        dv += torch.einsum("bkgqs,bkgqd->bskd", p * factors, d_rows)
        dp = torch.einsum("bkgqd,bskd->bkgqs", d_rows, v) * factors
        ds = p * (dp - _grouped(delta[:, rows].unsqueeze(-1), heads)) * scale
        dq[:, rows] = _ungrouped(torch.einsum("bkgqs,bskd->bkgqd", ds, k))
        dk += torch.einsum("bkgqs,bkgqd->bskd", ds, q_rows)
    return dq, dk, dv

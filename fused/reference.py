"""Block attention in plain torch: the oracle of every kernel, and what runs on a device that has no kernel.

It holds the whole matrix of scores, ``batch * heads * Sq * Sk`` numbers.
"""

import torch
from torch import Tensor

from fused.mask import BlockMask


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """``[B, S, H, D] -> [B, Hkv, group, S, D]``: query head ``h`` belongs to key head ``h // group``."""
    return x.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)


def _ungrouped(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _scores(q: Tensor, k: Tensor, mask: BlockMask, scale: float) -> Tensor:
    scores = torch.einsum("bkgqd,bskd->bkgqs", q, k) * scale
    return scores.masked_fill(~mask.dense(q.device).unsqueeze(2), -torch.inf)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """``(out [B, Sq, H, D], lse [B, Sq, H])``; a query that sees nothing has out 0 and lse -inf."""
    scores = _scores(_grouped(q, k.shape[2]), k, mask, scale)
    lse = torch.logsumexp(scores, dim=-1)
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    out = torch.einsum("bkgqs,bskd->bkgqd", (scores - shift.unsqueeze(-1)).exp(), v)
    return _ungrouped(out), _ungrouped(lse.unsqueeze(-1)).squeeze(-1)


def backward(
    q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, mask: BlockMask, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of ``(dq, dk, dv)``, from the global ``lse`` and ``delta`` (FlashAttention-2, algorithm 2)."""
    heads = k.shape[2]
    q_grouped, d_grouped = _grouped(q, heads), _grouped(d_out, heads)
    shift = _grouped(lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1), heads)
    p = (_scores(q_grouped, k, mask, scale) - shift).exp()
    dv = torch.einsum("bkgqs,bkgqd->bskd", p, d_grouped)
    dp = torch.einsum("bkgqd,bskd->bkgqs", d_grouped, v)
    ds = p * (dp - _grouped(delta.unsqueeze(-1), heads)) * scale
    return (
        _ungrouped(torch.einsum("bkgqs,bskd->bkgqd", ds, k)),
        torch.einsum("bkgqs,bkgqd->bskd", ds, q_grouped),
        dv,
    )

"""Block attention on a CPU: torch's fused flash attention on tiles.

Measured on one AVX-512 core (1024 x 1024, 8 heads of 64): the fused backward takes 82 ms, a backward from matrix
products 155 ms, so the fused one it is, although it asks for ``out`` where the ring has ``delta``. It uses ``out`` only
in ``rowsum(d_out * out)``, so any tensor with that row sum will do, and ``d_out * delta / |d_out|^2`` is one: its terms
all have one sign, so the sum is at least as exact as the one it stands for.

The fused backward in bf16 is eight to twelve times slower than in fp32 on a CPU without AMX, and the forward no faster:
callers pass fp32 or fp64 (:func:`fused.block.block_forward` widens).
"""

from typing import Any

import torch
from torch import Tensor

from fused.mask import BlockMask
from fused.merge import merge_
from fused.tiles import Tile

_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _covers(tile: Tile, batch: int, queries: int) -> bool:
    return tile.q0 == 0 and tile.q1 == queries and tile.b0 == 0 and tile.b1 in (-1, batch)


def _rows(x: Tensor, tile: Tile, start: int, stop: int) -> Tensor:
    """The tile's part of ``[B, S, ...]`` as the kernel wants it, ``[B, heads, S, ...]``; a view."""
    batch = x if tile.b1 == -1 else x[tile.b0 : tile.b1]
    return batch[:, start:stop].transpose(1, 2)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, into: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """See :func:`fused.block.block_forward`."""
    tiles = mask.tiles
    if into is None:
        if len(tiles) == 1 and _covers(tiles[0], q.shape[0], q.shape[1]):
            tile = tiles[0]
            out, lse = _forward(
                q.transpose(1, 2),
                k[:, tile.k0 : tile.k1].transpose(1, 2),
                v[:, tile.k0 : tile.k1].transpose(1, 2),
                0.0,
                tile.causal,
                scale=scale,
            )
            return out.transpose(1, 2), lse.transpose(1, 2)
        # Rows that no tile covers see nothing here: out 0, lse -inf (the kernel would say lse 0 for them).
        into = (torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf))
    for tile in tiles:
        out, lse = _forward(
            _rows(q, tile, tile.q0, tile.q1),
            _rows(k, tile, tile.k0, tile.k1),
            _rows(v, tile, tile.k0, tile.k1),
            0.0,
            tile.causal,
            scale=scale,
        )
        merge_(_rows(into[0], tile, tile.q0, tile.q1), _rows(into[1], tile, tile.q0, tile.q1), out, lse)
    return into


def stand_in_out(d_out: Tensor, delta: Tensor) -> Tensor:
    """A tensor whose ``rowsum(d_out * .)`` is ``delta``: ``d_out * delta / |d_out|^2``.

    Where ``d_out`` is 0, so are ``delta`` and the result.
    """
    norm = torch.linalg.vector_norm(d_out, dim=-1, keepdim=True)
    smallest, largest = norm.aminmax()
    if smallest.item() > 1e-15 and largest.item() < 1e15:
        return d_out * (delta.unsqueeze(-1) / norm.square_())
    # Rows of zeros, and rows whose squares vanish or overflow: ten times slower, scaled by each row's largest entry.
    peak = d_out.abs().amax(-1, keepdim=True)
    unit = d_out / peak.clamp_min(torch.finfo(d_out.dtype).tiny)
    factor = delta.unsqueeze(-1) / (peak * (unit * unit).sum(-1, keepdim=True))
    return unit.mul_(factor.masked_fill_(peak == 0, 0.0))


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: BlockMask,
    scale: float,
    dq: Tensor | None,
    dkv: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fused.block.block_backward`."""
    tiles = mask.tiles
    out = stand_in_out(d_out, delta)
    whole = len(tiles) == 1 and _covers(tiles[0], q.shape[0], q.shape[1])
    dk, dv = dkv if dkv is not None else (None, None)
    for tile in tiles:
        grads = _backward(
            _rows(d_out, tile, tile.q0, tile.q1),
            _rows(q, tile, tile.q0, tile.q1),
            _rows(k, tile, tile.k0, tile.k1),
            _rows(v, tile, tile.k0, tile.k1),
            _rows(out, tile, tile.q0, tile.q1),
            _rows(lse, tile, tile.q0, tile.q1),
            0.0,
            tile.causal,
            scale=scale,
        )
        dq_tile, dk_tile, dv_tile = grads
        whole_keys = whole and tile.k0 == 0 and tile.k1 == k.shape[1]
        dq = _accumulate(dq, dq_tile, q, tile, tile.q0, tile.q1, whole)
        dk = _accumulate(dk, dk_tile, k, tile, tile.k0, tile.k1, whole_keys)
        dv = _accumulate(dv, dv_tile, v, tile, tile.k0, tile.k1, whole_keys)
    return (
        torch.zeros_like(q) if dq is None else dq,
        torch.zeros_like(k) if dk is None else dk,
        torch.zeros_like(v) if dv is None else dv,
    )


def _accumulate(
    total: Tensor | None, part: Tensor, like: Tensor, tile: Tile, start: int, stop: int, whole: bool
) -> Tensor:
    """Add a tile's gradient ``[B, heads, S, D]``; if it covers everything, the kernel's tensor becomes the total."""
    if total is None:
        if whole:
            return part.transpose(1, 2)
        total = torch.zeros_like(like)
    _rows(total, tile, start, stop).add_(part)
    return total

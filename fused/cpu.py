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
from torch.nn.functional import pad

from fused.mask import BlockMask
from fused.merge import merge_
from fused.tiles import Tile

_forward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _rows(x: Tensor, tile: Tile, start: int, stop: int) -> Tensor:
    """The tile's part of ``[B, S, ...]`` as the kernel wants it, ``[B, heads, S, ...]``; a view."""
    batch = x if tile.b1 == -1 else x[tile.b0 : tile.b1]
    return batch[:, start:stop].transpose(1, 2)


def _is_whole(tiles: tuple[Tile, ...], batch: int, queries: int) -> bool:
    """Whether one tile holds all queries, so that the kernel's tensors are the result."""
    return len(tiles) == 1 and tiles[0].q1 - tiles[0].q0 == queries and tiles[0][:2] in ((0, -1), (0, batch))


def _mask_options(mask: BlockMask, tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """What tells the kernel about a tile's mask: a flag, or a tensor to add to the scores ``[b or 1, 1, q, k]``."""
    if tile.kind != "masked":
        return {"is_causal": tile.kind == "causal"}
    start, stop = (x[:, :, None] for x in mask.bounds(torch.device("cpu")))
    rows = slice(tile.b0, None if tile.b1 == -1 else tile.b1), slice(tile.q0, tile.q1)
    key = torch.arange(tile.k0, tile.k1, dtype=torch.int32)
    hidden = (key < start[rows]) | (key >= stop[rows])
    return {"attn_mask": torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf).unsqueeze(1)}


def _widened(x: Tensor, width: int) -> Tensor:
    """Zeros up to ``width``: the kernel wants keys and values of one width, and zeros change no score and no sum."""
    return pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, into: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """See :func:`fused.block.block_forward`."""
    tiles, value_width = mask.tiles, v.shape[3]
    width = max(q.shape[3], value_width)
    q, k, v = _widened(q, width), _widened(k, width), _widened(v, width)
    fresh, whole = into is None, _is_whole(mask.tiles, *q.shape[:2])
    if into is None and not whole:
        # Rows that no tile covers see nothing here: out 0, lse -inf (the kernel would say lse 0 for them).
        into = (q.new_zeros(*q.shape[:3], value_width), q.new_full(q.shape[:3], -torch.inf))
    previous = None
    for tile in tiles:
        out, lse = _forward(
            _rows(q, tile, tile.q0, tile.q1),
            _rows(k, tile, tile.k0, tile.k1),
            _rows(v, tile, tile.k0, tile.k1),
            0.0,
            scale=scale,
            **_mask_options(mask, tile, q.dtype),
        )
        out = out[..., :value_width]
        if into is None:
            return out.transpose(1, 2), lse.transpose(1, 2)
        places = _rows(into[0], tile, tile.q0, tile.q1), _rows(into[1], tile, tile.q0, tile.q1)
        if fresh and (tile.b0, tile.q0) != previous:  # nothing to merge with yet
            places[0].copy_(out)
            places[1].copy_(lse)
        else:
            merge_(*places, out, lse)
        previous = tile.b0, tile.q0
    assert into is not None, "a block of one tile has returned its result"
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
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fused.block.block_backward`."""
    totals: list[Tensor | None] = [dq, *(dkv if dkv is not None else (None, None))]
    likes = (q, k, v)
    width = max(q.shape[3], v.shape[3])
    out = _widened(stand_in_out(d_out, delta) if out is None else out, width)
    q, k, v, d_out = (_widened(x, width) for x in (q, k, v, d_out))
    whole = _is_whole(mask.tiles, *q.shape[:2])
    for tile in mask.tiles:
        grads = _backward(
            _rows(d_out, tile, tile.q0, tile.q1),
            _rows(q, tile, tile.q0, tile.q1),
            _rows(k, tile, tile.k0, tile.k1),
            _rows(v, tile, tile.k0, tile.k1),
            _rows(out, tile, tile.q0, tile.q1),
            _rows(lse, tile, tile.q0, tile.q1),
            0.0,
            scale=scale,
            **({"is_causal": False} | _mask_options(mask, tile, q.dtype)),
        )
        spans = ((tile.q0, tile.q1), (tile.k0, tile.k1), (tile.k0, tile.k1))
        for index, (grad, like, span) in enumerate(zip(grads, likes, spans, strict=True)):
            total, part = totals[index], grad[..., : like.shape[3]]
            if total is None and whole and span == (0, like.shape[1]):
                totals[index] = part.transpose(1, 2)  # the kernel's tensor becomes the total
                continue
            if total is None:
                total = totals[index] = torch.zeros_like(like)
            _rows(total, tile, *span).add_(part)
    dq_total, dk_total, dv_total = (
        torch.zeros_like(like) if total is None else total for total, like in zip(totals, likes, strict=True)
    )
    return dq_total, dk_total, dv_total

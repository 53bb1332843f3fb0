"""Block attention on a GPU: the Triton kernels behind the contract of :mod:`fused.block`."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from fused.dropout import Dropout
from fused.mask import BlockMask
from fused.triton_backward import backward_kernel, query_kernel
from fused.triton_config import Tiles, target_of, tiles
from fused.triton_dropout import dropout_argument
from fused.triton_forward import forward_kernel
from fused.triton_launch import Launch, padded, precision, strides, tiled
from fused.triton_ranges import on_device

LOG2_E = 1.4426950408889634


class Block(NamedTuple):
    """Queries ``[batch, Sq, heads, DK]``, keys and values ``[batch, Sk, kv_heads, DK or DV]``, and the mask."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: BlockMask
    scale: float
    dropout: Dropout | None = None

    @property
    def empty(self) -> bool:
        return self.q.numel() == 0 or self.k.numel() == 0

    def options(self, config: Tiles) -> dict[str, object]:
        """The compile-time arguments that all kernels have."""
        key, value = self.q.shape[3], self.v.shape[3]
        return {
            "GROUP": self.q.shape[2] // self.k.shape[2],
            "DK": key,
            "DV": value,
            "WIDTH_K": padded(key),
            "WIDTH_V": padded(value),
            "BLOCK_Q": config.block_q,
            "BLOCK_K": config.block_k,
            "SPLIT": config.split,
            "PRECISION": precision(self.q.dtype),
            "num_warps": config.warps,
            "num_stages": config.stages,
        }

    def tiles(self, kernel: str) -> Tiles:
        width = padded(max(self.q.shape[3], self.v.shape[3]))
        return tiles(target_of(self.q.device), kernel, self.q.element_size(), width)

    @property
    def drop(self) -> tuple[object, ...] | None:
        return dropout_argument(self.dropout, self.mask, self.q.device)

    @property
    def mask_stride(self) -> int:
        """From one batch row's ranges to the next one's."""
        batch, rows = self.mask.start.shape
        return rows if batch > 1 else 0


class Upstream(NamedTuple):
    """The output's gradient ``[batch, Sq, heads, DV]`` and the queries' global statistics ``[batch, Sq, heads]``."""

    d_out: Tensor
    lse: Tensor
    delta: Tensor


def forward_launch(block: Block, out: Tensor, lse: Tensor, carry: bool, config: Tiles) -> Launch:
    """The launch that writes ``out`` and ``lse``; with ``carry`` it merges into what they hold."""
    q, k, v, mask, scale, _ = block
    batch, queries, heads, _ = q.shape
    q_tiles, out_tiles = tiled(config.block_q, config.descriptors, q, out)
    arguments = (
        *(q_tiles, *tiled(config.block_k, config.descriptors, k, v), out_tiles, lse),
        *mask.bounds(q.device),
        *map(strides, (q, k, v, out, lse)),
        *(block.mask_stride, queries, k.shape[1], scale * LOG2_E, block.drop),
    )
    grid = (triton.cdiv(queries, config.block_q), batch * heads)
    return Launch(forward_kernel, grid, arguments, {"HEADS": heads, "CARRY": carry} | block.options(config))


def backward_launch(
    block: Block, upstream: Upstream, dq: Tensor, dkv: tuple[Tensor, Tensor], add: bool, share_dq: bool, config: Tiles
) -> Launch:
    """The launch that writes ``dkv`` (with ``add``, adds to them); with ``share_dq`` it adds to ``dq`` as well."""
    q, k, v, mask, scale, _ = block
    batch, keys, kv_heads, _ = k.shape
    ranges = on_device(mask, config.block_q, config.block_k, q.device)
    q_tiles, d_tiles, dq_tiles = tiled(config.block_q, config.descriptors, q, upstream.d_out, dq)
    k_tiles, v_tiles, *dkv_tiles = tiled(config.block_k, config.descriptors, k, v, *dkv)
    arguments = (
        *(q_tiles, k_tiles, v_tiles, d_tiles, upstream.lse, upstream.delta),
        *(*mask.bounds(q.device), ranges, dq_tiles, *dkv_tiles),
        *map(strides, (q, k, v, upstream.d_out, upstream.lse)),
        *(block.mask_stride, ranges.stride(0) if block.mask_stride else 0),
        *map(strides, (dq, *dkv)),
        *(q.shape[1], keys, scale, block.drop),
    )
    options = {"KV_HEADS": kv_heads, "ADD": add, "SHARE_DQ": share_dq}
    grid = (triton.cdiv(keys, config.block_k), batch * kv_heads)
    return Launch(backward_kernel, grid, arguments, options | block.options(config))


def query_launch(block: Block, upstream: Upstream, dq: Tensor, add: bool, config: Tiles) -> Launch:
    """The launch that writes ``dq`` (with ``add``, adds to it), the same bits every time."""
    q, k, v, mask, scale, _ = block
    batch, queries, heads, _ = q.shape
    q_tiles, d_tiles, dq_tiles = tiled(config.block_q, config.descriptors, q, upstream.d_out, dq)
    arguments = (
        *(q_tiles, *tiled(config.block_k, config.descriptors, k, v), d_tiles, upstream.lse, upstream.delta),
        *(*mask.bounds(q.device), dq_tiles),
        *map(strides, (q, k, v, upstream.d_out, upstream.lse)),
        *(block.mask_stride, strides(dq), queries, k.shape[1], scale, block.drop),
    )
    grid = (triton.cdiv(queries, config.block_q), batch * heads)
    return Launch(query_kernel, grid, arguments, {"HEADS": heads, "ADD": add} | block.options(config))


def _dense(x: Tensor) -> Tensor:
    """The tensor with a last dim that kernels can read."""
    return x if x.stride(3) == 1 else x.contiguous()


def _heads_first(x: Tensor) -> Tensor:
    """Row statistics ``[batch, rows, heads]`` in the memory order that the backward's inner loop reads."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def forward(
    block: Block, into: tuple[Tensor, Tensor] | None = None, config: Tiles | None = None
) -> tuple[Tensor, Tensor]:
    """See :func:`fused.block.block_forward`; ``config`` replaces the tiles that the device would get."""
    q, v = block.q, block.v
    assert block.scale > 0, "the kernel takes a row's maximum before it scales"
    if block.empty:
        shape = (*q.shape[:3], v.shape[3])
        return into or (q.new_zeros(shape, dtype=torch.float32), _statistics(q).fill_(-torch.inf))
    out, lse = into or (q.new_empty((*q.shape[:3], v.shape[3]), dtype=torch.float32), _statistics(q))
    block = block._replace(q=_dense(q), k=_dense(block.k), v=_dense(v))
    forward_launch(block, out, lse, into is not None, config or block.tiles("forward")).run()
    return out, lse


def _statistics(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def backward(
    block: Block,
    upstream: Upstream,
    dq: Tensor | None = None,
    dkv: tuple[Tensor, Tensor] | None = None,
    config: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fused.block.block_backward`.

    dq is summed in memory by all programs at once, in no fixed order; under ``torch.use_deterministic_algorithms`` a
    kernel of its own computes it, for two products more.
    """
    ordered, wide = torch.are_deterministic_algorithms_enabled(), torch.float32
    q, k, v = map(_dense, block[:3])
    block = block._replace(q=q, k=k, v=v)
    upstream = Upstream(_dense(upstream.d_out), *map(_heads_first, upstream[1:]))
    add_dq, add_dkv = dq is not None, dkv is not None
    if block.empty or not ordered:
        dq = torch.zeros_like(q, dtype=wide) if dq is None else dq
    dq = torch.empty_like(q, dtype=wide) if dq is None else dq
    fresh = torch.zeros_like if block.empty else torch.empty_like
    dkv = dkv or (fresh(k, dtype=wide), fresh(v, dtype=wide))
    if not block.empty:
        tiles_k, tiles_q = config or block.tiles("backward"), config or block.tiles("query")
        backward_launch(block, upstream, dq, dkv, add_dkv, not ordered, tiles_k).run()
        if ordered:
            query_launch(block, upstream, dq, add_dq, tiles_q).run()
    return dq, *dkv

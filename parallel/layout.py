"""Which tokens of a sequence each rank holds.

A sequence is cut into equal chunks and a rank holds one or two of them:

- ``contiguous``: ``world_size`` chunks, rank ``r`` holds chunk ``r``. Simple, but under a causal mask the last rank
  has most of the work.
- ``zigzag``: ``2 * world_size`` chunks, rank ``r`` holds chunks ``r`` and ``2 * world_size - 1 - r``: an early one and
  a late one, so that every rank has the same causal work.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import LongTensor, Tensor

from conf.errors import ConfigError
from conf.rules import nearest

LAYOUTS = ("contiguous", "zigzag")


def chunks(world_size: int, rank: int, layout: str) -> tuple[int, ...]:
    """The chunks of the sequence that ``rank`` holds, in the order in which it holds them (ascending)."""
    if layout == "contiguous":
        return (rank,)
    if layout == "zigzag":
        return (rank, 2 * world_size - 1 - rank)
    raise ConfigError("layout", layout, f"one of {', '.join(LAYOUTS)}", nearest(layout, LAYOUTS))


def chunk_count(world_size: int, layout: str) -> int:
    """Into how many chunks the layout cuts a sequence."""
    return world_size * len(chunks(world_size, 0, layout))


def _chunk_length(seq_len: int, world_size: int, layout: str) -> int:
    count = chunk_count(world_size, layout)
    if seq_len % count != 0:
        raise ConfigError(
            "sequence length",
            seq_len,
            f"the {layout} layout cuts it into {count} equal chunks for {world_size} ranks",
            f"a multiple of {count}",
        )
    return seq_len // count


def positions(seq_len: int, world_size: int, rank: int, layout: str) -> LongTensor:
    """Absolute positions ``[seq_len / world_size]`` of the tokens that ``rank`` holds, ascending.

    Raises:
        ConfigError: unknown layout, or a length that it cannot cut evenly.
    """
    length = _chunk_length(seq_len, world_size, layout)
    parts = [torch.arange(c * length, (c + 1) * length) for c in chunks(world_size, rank, layout)]
    return cast(LongTensor, torch.cat(parts))


def shard(x: Tensor, dim: int, world_size: int, rank: int, layout: str) -> Tensor:
    """The part of ``x`` that ``rank`` holds when ``dim`` is the sequence; contiguous in memory."""
    if world_size == 1:
        return x.contiguous()
    length = _chunk_length(x.shape[dim], world_size, layout)
    parts = [x.narrow(dim, c * length, length) for c in chunks(world_size, rank, layout)]
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()


def unshard(parts: Sequence[Tensor], dim: int, layout: str) -> Tensor:
    """The whole sequence from what all ranks hold, given in rank order; the inverse of :func:`shard`."""
    world_size = len(parts)
    whole: list[Tensor | None] = [None] * chunk_count(world_size, layout)
    for rank, part in enumerate(parts):
        held = chunks(world_size, rank, layout)
        for chunk, piece in zip(held, part.chunk(len(held), dim), strict=True):
            whole[chunk] = piece
    return torch.cat([piece for piece in whole if piece is not None], dim)

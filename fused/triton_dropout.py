"""The dropout of :mod:`fused.dropout` in Triton: the same hash, so the same weights are dropped on every device."""

from weakref import WeakKeyDictionary

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.dropout import Dropout, mix
from fused.mask import BlockMask

GOLDEN = tl.constexpr(0x9E3779B9)
_positions: WeakKeyDictionary[BlockMask, dict[torch.device, tuple[Tensor, ...]]] = WeakKeyDictionary()


@triton.jit
def mix_bits(x):
    """:func:`fused.dropout.mix` on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_bits(dropout, batch, head, row, rows, ROWS: tl.constexpr):
    """The hash of (seed, batch row, head, query position), ``[ROWS]``; zeros if there is no dropout."""
    index = row + tl.arange(0, ROWS)
    if dropout is None:
        bits = tl.zeros((ROWS,), tl.uint32)
    else:
        query = tl.load(dropout[0] + index, mask=index < rows, other=0).to(tl.uint32)
        bits = mix_bits(dropout[2].to(tl.uint32) + GOLDEN * batch.to(tl.uint32))
        bits = mix_bits(bits + GOLDEN * (head + dropout[3]).to(tl.uint32))
        bits = mix_bits(bits + query)
    return bits


@triton.jit
def dropped(x, bits, dropout, key, keys, COLUMNS: tl.constexpr):
    """``x [rows, COLUMNS]`` times 0 where the weight is dropped and ``1 / (1 - rate)`` elsewhere."""
    index = key + tl.arange(0, COLUMNS)
    position = tl.load(dropout[1] + index, mask=index < keys, other=0).to(tl.uint32)
    kept = mix_bits(bits[:, None] + position[None, :]) >= dropout[4].to(tl.uint32)
    return tl.where(kept, x * dropout[5], 0.0)


def dropout_argument(dropout: Dropout | None, mask: BlockMask, device: torch.device) -> tuple[object, ...] | None:
    """``(query positions, key positions, mixed seed, first head, threshold, factor)``; the words as int32."""
    if dropout is None:
        return None
    made = _positions.setdefault(mask, {})
    if device not in made:
        sides = (mask.query_positions, mask.key_positions)
        made[device] = tuple(torch.from_numpy(side.astype(np.uint32).view(np.int32)).to(device) for side in sides)
    seed = int(mix(torch.tensor(dropout.seed & 0xFFFFFFFF)))
    return *made[device], _signed(seed), dropout.head, _signed(round(dropout.rate * 2**32)), 1.0 / (1.0 - dropout.rate)


def _signed(word: int) -> int:
    """A 32-bit word as the int32 of the same bits, so that every word has one type."""
    return word - 2**32 if word >= 2**31 else word

"""What the Triton kernels of block attention share: loads, stores, and masks as intervals.

One source for every GPU. A tensor argument is a pointer or a tensor descriptor, and :func:`load_rows` takes either:
descriptors become bulk copies (TMA) where the hardware has them, pointers become asynchronous copies.

The mask is an interval per query row: row ``i`` sees the keys ``[start[i], stop[i])``. That is every mask in use (full,
causal, window, prefix, packed documents), and it orders the work: the key tiles that a tile of queries touches are one
range, and those that all its rows see in full are one range inside it. So each kernel has three loops (masked, full,
masked) and no branch in a loop, which would cost the loop its software pipelining.

Tensors are ``[batch, rows, heads, width]``, row statistics ``[batch, rows, heads]`` in any strides, intervals ``[batch
or 1, rows]``. Strides are tuples; the last dim's is 1 and not passed. ``WIDTH`` is a head width ``D`` padded to a power
of two, and the padding reads as 0.
"""

# The kernels are Triton's language, which a checker of Python takes for Python: constants are not constexpr to it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(2**31 - 1)


@triton.jit
def row_pointers(x, strides, batch, head, row, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to ``[ROWS, WIDTH]``: a 64-bit base for the tile and 32-bit offsets within it."""
    base = x + tl.cast(batch, tl.int64) * strides[0] + tl.cast(row, tl.int64) * strides[1] + head * strides[2]
    return base + tl.arange(0, ROWS)[:, None] * strides[1] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def inside(row, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Which entries of a tile lie in the tensor."""
    return (row + tl.arange(0, ROWS) < rows)[:, None] & (tl.arange(0, WIDTH) < D)[None, :]


@triton.jit
def load_rows(
    x, strides, batch, head, row, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr
):
    """Rows ``[row, row + ROWS)`` as ``[ROWS, WIDTH]``, 0 outside the tensor; without RAGGED none lies outside."""
    if isinstance(x, tl.core.tensor_descriptor_base):
        tile = x.load([batch, row, head, 0]).reshape(ROWS, WIDTH)
    else:
        pointers = row_pointers(x, strides, batch, head, row, ROWS, WIDTH)
        if RAGGED or WIDTH != D:
            tile = tl.load(pointers, mask=inside(row, rows, ROWS, WIDTH, D), other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(
    x,
    tile,
    strides,
    batch,
    head,
    row,
    rows,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    D: tl.constexpr,
    ADD: tl.constexpr,
):
    """Write a tile that no other program writes to, or add it to what is there."""
    if isinstance(x, tl.core.tensor_descriptor_base):
        if ADD:
            x.atomic_add([batch, row, head, 0], tile.reshape(1, ROWS, 1, WIDTH))
        else:
            x.store([batch, row, head, 0], tile.reshape(1, ROWS, 1, WIDTH))
    else:
        pointers = row_pointers(x, strides, batch, head, row, ROWS, WIDTH)
        mask = inside(row, rows, ROWS, WIDTH, D)
        if ADD:
            tile += tl.load(pointers, mask=mask, other=0.0)
        tl.store(pointers, tile, mask=mask)


@triton.jit
def share_rows(x, tile, strides, batch, head, row, rows, ROWS: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Add a tile to rows that other programs add to at the same time."""
    if isinstance(x, tl.core.tensor_descriptor_base):
        x.atomic_add([batch, row, head, 0], tile.reshape(1, ROWS, 1, WIDTH))
    else:
        pointers = row_pointers(x, strides, batch, head, row, ROWS, WIDTH)
        tl.atomic_add(pointers, tile, mask=inside(row, rows, ROWS, WIDTH, D), sem="relaxed")


@triton.jit
def key_ranges(start, stop, in_range, keys, BLOCK_K: tl.constexpr):
    """Keys ``[first, last)`` that some row sees, and in it ``[full, ragged)``, whole tiles that every row sees."""
    sees = in_range & (start < stop)
    first = tl.min(tl.where(sees, start, LARGEST), 0)
    last = tl.max(tl.where(sees, stop, 0), 0)
    first = tl.minimum(first, last) // BLOCK_K * BLOCK_K
    full = (tl.max(tl.where(in_range, start, 0), 0) + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    ragged = tl.min(tl.where(in_range, stop, keys), 0) // BLOCK_K * BLOCK_K
    ragged = tl.maximum(tl.minimum(ragged, last), first)
    full = tl.minimum(tl.maximum(full, first), ragged)
    return first, full, ragged, last


@triton.jit
def visible(start, stop, key, BLOCK_K: tl.constexpr):
    """``[rows, BLOCK_K]``: does the row see the key?"""
    keys = key + tl.arange(0, BLOCK_K)[None, :]
    return (keys >= start[:, None]) & (keys < stop[:, None])

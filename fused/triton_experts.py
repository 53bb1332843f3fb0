"""What a layer of experts computes on a GPU: gather, SwiGLU of each row's own expert, weighted sum per token.

Rows are sorted by expert and cut into tiles of BLOCK_M, none of which crosses from one expert to the next; a table says
for every tile whose rows it holds. The table is made by the host, which knows the number of every expert's rows, so no
program searches for its expert and only an expert's last tile has idle rows. Tiles of an expert are neighbours in the
grid: its weights are read while they are in the L2 cache.

Nothing is added up by atomics. Sums over the rows of a token follow a list of its rows, sums over the rows of an expert
are a loop of one program; so results repeat bit by bit.
"""

# The kernels are Triton's language, which a checker of Python takes for Python: constants are not constexpr to it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl


@triton.jit
def tile_rows(table, rows, BLOCK_M: tl.constexpr, GATHER: tl.constexpr):
    """Of this program's tile: (expert, first row, which rows exist, where each is read from)."""
    tile = table + 3 * tl.program_id(0)
    first = tl.load(tile + 1)
    row = first + tl.arange(0, BLOCK_M)
    there = row < tl.load(tile + 2)
    source = tl.load(rows + row, mask=there, other=0) if GATHER else row
    return tl.load(tile).to(tl.int64), first.to(tl.int64), there, source.to(tl.int64)


@triton.jit
def entries(x, first, column, width, ROWS: tl.constexpr):
    """Pointers to columns of the rows from ``first`` of a dense matrix: a 64-bit base, 32-bit offsets within a tile."""
    return x + first * width + (tl.arange(0, ROWS)[:, None] * width + column[None, :])


@triton.jit
def hidden_kernel(
    x, rows, table, weight, hidden, gate_up, dim, x_stride, expert_stride, weight_stride,
    H: tl.constexpr, GATHER: tl.constexpr, KEEP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``hidden[r] = silu(x[rows[r]] Wg') * (x[rows[r]] Wu')``; with KEEP both factors go to ``gate_up [R, 2H]``."""
    expert, first, there, source = tile_rows(table, rows, BLOCK_M, GATHER)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < H
    inputs = x + source[:, None] * x_stride
    gates = weight + expert * expert_stride + column[None, :] * weight_stride
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(inputs + k[None, :], mask=there[:, None] & (k < dim)[None, :], other=0.0)
        mask = (k < dim)[:, None] & inside[None, :]
        gate = tl.dot(a, tl.load(gates + k[:, None], mask=mask, other=0.0), gate, input_precision=PRECISION)
        up = tl.dot(
            a, tl.load(gates + H * weight_stride + k[:, None], mask=mask, other=0.0), up, input_precision=PRECISION
        )
    mask = there[:, None] & inside[None, :]
    if KEEP:
        kept = entries(gate_up, first, column, 2 * H, BLOCK_M)
        tl.store(kept, gate, mask=mask)
        tl.store(kept + H, up, mask=mask)
    tl.store(entries(hidden, first, column, H, BLOCK_M), gate * tl.sigmoid(gate) * up, mask=mask)


@triton.jit
def product_kernel(
    x, table, weight, out, width, columns, expert_stride, k_stride, column_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[r] = x[r] W`` with the matrix ``[width, columns]`` of each row's expert, in any strides."""
    expert, first, there, _ = tile_rows(table, table, BLOCK_M, False)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < columns
    matrix = weight + expert * expert_stride + column[None, :] * column_stride
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, width, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(entries(x, first, k, width, BLOCK_M), mask=there[:, None] & (k < width)[None, :], other=0.0)
        b = tl.load(matrix + k[:, None] * k_stride, mask=(k < width)[:, None] & inside[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(entries(out, first, column, columns, BLOCK_M), total, mask=there[:, None] & inside[None, :])


@triton.jit
def combine_kernel(
    x, order, ends, gates, out, dim, WEIGHTED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """``out[n]`` = the sum of the rows ``x[order[i]]``, ``ends[n] <= i < ends[n + 1]``, each times its gate."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < dim
    total = tl.zeros((BLOCK_N,), tl.float32)
    for place in tl.range(tl.load(ends + token), tl.load(ends + token + 1)):
        row = tl.load(order + place)
        part = tl.load(x + row * dim + column, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(gates + row).to(tl.float32)
        total += part
    tl.store(out + token * dim + column, total, mask=inside)


@triton.jit
def hidden_backward_kernel(
    d_out, rows, table, weight, gate_up, gates, d_gate_up, weighted, d_gates, dim, d_stride, expert_stride,
    weight_stride, H: tl.constexpr, GATHER: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """From a row's output gradient to those of its two factors, and what the other gradients need.

    ``p = d_out[rows[r]] Wd`` is the gradient of the hidden row before its gate. A gate's gradient is ``<hidden, p>``,
    so the experts' outputs are not kept; its part over these BLOCK_N columns goes to ``d_gates [R, column tiles]``.
    ``weighted`` is the hidden row times its gate, which the gradient of Wd is made from.
    """
    expert, first, there, source = tile_rows(table, rows, BLOCK_M, GATHER)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < H
    inputs = d_out + source[:, None] * d_stride
    matrix = weight + expert * expert_stride + column[None, :]
    p = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, dim, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(inputs + k[None, :], mask=there[:, None] & (k < dim)[None, :], other=0.0)
        b = tl.load(matrix + k[:, None] * weight_stride, mask=(k < dim)[:, None] & inside[None, :], other=0.0)
        p = tl.dot(a, b, p, input_precision=PRECISION)
    mask = there[:, None] & inside[None, :]
    kept = entries(gate_up, first, column, 2 * H, BLOCK_M)
    gate = tl.load(kept, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    active = gate * sigmoid
    up = tl.load(kept + H, mask=mask, other=0.0).to(tl.float32)
    share = tl.full((BLOCK_M,), 1.0, tl.float32)
    if WEIGHTED:
        row = first + tl.arange(0, BLOCK_M)
        tl.store(d_gates + row * tl.num_programs(1) + tl.program_id(1), tl.sum(active * up * p, 1), mask=there)
        share = tl.load(gates + row, mask=there, other=0.0).to(tl.float32)
    tl.store(entries(weighted, first, column, H, BLOCK_M), active * up * share[:, None], mask=mask)
    p *= share[:, None]
    given = entries(d_gate_up, first, column, 2 * H, BLOCK_M)
    tl.store(given + H, p * active, mask=mask)
    tl.store(given, p * up * (sigmoid + active * (1.0 - sigmoid)), mask=mask)


@triton.jit
def weight_kernel(
    left, right, rows, starts, out, height, width, left_stride, right_stride,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``out[e]`` = the sum over the rows of expert e of ``left[r]' right[r]``, ``[height, width]``; 0 without rows.

    One of the two sides may be read through ``rows``.
    """
    expert = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    last = tl.load(starts + expert + 1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(tl.load(starts + expert), last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        there = row < last
        source = tl.load(rows + row, mask=there, other=0) if GATHER_LEFT or GATHER_RIGHT else row
        a_row = (source if GATHER_LEFT else row).to(tl.int64)
        b_row = (source if GATHER_RIGHT else row).to(tl.int64)
        a = tl.load(
            left + a_row[None, :] * left_stride + i[:, None], mask=(i < height)[:, None] & there[None, :], other=0.0
        )
        b = tl.load(
            right + b_row[:, None] * right_stride + j[None, :], mask=there[:, None] & (j < width)[None, :], other=0.0
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(
        out + expert * height * width + i[:, None].to(tl.int64) * width + j[None, :],
        total,
        mask=(i < height)[:, None] & (j < width)[None, :],
    )

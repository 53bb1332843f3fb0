"""Block attention backward from the global lse and delta (FlashAttention-2, arXiv 2307.08691, algorithm 2).

With ``p = exp(scale * q k^T - lse)`` and ``ds = p * (d_out v^T - delta)``, a block's share of the gradients is
``dv = p^T d_out``, ``dk = scale * ds^T q`` and ``dq = scale * ds k``. It needs no output: delta stands for it.

:func:`backward_kernel` owns a tile of keys, so dk and dv gather in registers over all query heads of the group, and dq,
which all key tiles share, is added to memory: five products, and the order of those additions is the hardware's.
:func:`query_kernel` owns a tile of queries and computes dq alone: seven products for the pair, and bitwise the same
result every time.
"""

# The kernels are Triton's language, which a checker of Python takes for Python: constants are not constexpr to it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from fused.triton_dropout import dropped, row_bits
from fused.triton_tiles import INFINITY, LOG2_E, key_ranges, load_rows, share_rows, store_rows, visible


@triton.jit
def row_statistics(lse, delta, strides, batch, head, row, rows, ROWS: tl.constexpr):
    """lse in units of log 2, and delta. A row that saw nothing, or is not there, gets lse inf, hence p 0."""
    index = row + tl.arange(0, ROWS)
    offsets = tl.cast(batch, tl.int64) * strides[0] + index * strides[1] + head * strides[2]
    row_lse = tl.load(lse + offsets, mask=index < rows, other=INFINITY) * LOG2_E
    row_lse = tl.where(row_lse == -INFINITY, INFINITY, row_lse)
    return row_lse, tl.load(delta + offsets, mask=index < rows, other=0.0)


@triton.jit
def score_gradients(
    q, k, v, d_out, lse, delta, start, stop, key, keys, scale, dropout, bits,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``p`` (after dropout) and ``ds``; rows are queries, so that lse and delta cost few registers a thread."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible(start, stop, key, BLOCK_K), scores, -INFINITY)
    p = tl.exp2(scores * (scale * LOG2_E) - lse[:, None])
    dp = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
    if dropout is None:
        ds = p * (dp - delta[:, None])
    else:
        ds = p * (dropped(dp, bits, dropout, key, keys, BLOCK_K) - delta[:, None])
        p = dropped(p, bits, dropout, key, keys, BLOCK_K)
    return p, ds


@triton.jit
def gather_queries(
    dk, dv, k_tile, v_tile, q, d_out, lse, delta, start, stop, dq,
    q_strides, d_out_strides, lse_strides, mask_stride, dq_strides,
    batch, head, key, first, last, queries, keys, scale, dropout,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, MASKED: tl.constexpr, SHARE_DQ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to ``dk`` (unscaled) and ``dv`` what the queries ``[first, last)`` of one head give this tile of keys."""
    for row in tl.range(first, last, BLOCK_Q):
        rows = row + tl.arange(0, BLOCK_Q)
        q_tile = load_rows(q, q_strides, batch, head, row, queries, BLOCK_Q, WIDTH_K, DK, MASKED)
        d_tile = load_rows(d_out, d_out_strides, batch, head, row, queries, BLOCK_Q, WIDTH_V, DV, MASKED)
        row_lse, row_delta = row_statistics(lse, delta, lse_strides, batch, head, row, queries, BLOCK_Q)
        row_start = tl.load(start + batch * mask_stride + rows, mask=rows < queries, other=0)
        row_stop = tl.load(stop + batch * mask_stride + rows, mask=rows < queries, other=0)
        bits = row_bits(dropout, batch, head, row, queries, BLOCK_Q)
        p, ds = score_gradients(
            q_tile, k_tile, v_tile, d_tile, row_lse, row_delta, row_start, row_stop, key, keys, scale, dropout, bits,
            BLOCK_K, MASKED, PRECISION,
        )  # fmt: skip
        dv = tl.dot(tl.trans(p.to(d_tile.dtype)), d_tile, dv, input_precision=PRECISION)
        ds = ds.to(q_tile.dtype)
        dk = tl.dot(tl.trans(ds), q_tile, dk, input_precision=PRECISION)
        if SHARE_DQ:
            part = tl.dot(ds, k_tile, input_precision=PRECISION) * scale
            share_rows(dq, part, dq_strides, batch, head, row, queries, BLOCK_Q, WIDTH_K, DK)
    return dk, dv


@triton.jit(do_not_specialize=["dropout"])
def backward_kernel(
    q, k, v, d_out, lse, delta, start, stop, ranges, dq, dk, dv,
    q_strides, k_strides, v_strides, d_out_strides, lse_strides, mask_stride, ranges_stride,
    dq_strides, dk_strides, dv_strides, queries, keys, scale, dropout,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    ADD: tl.constexpr, SHARE_DQ: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk`` and ``dv`` of a tile of keys (with ADD, added to them), and with SHARE_DQ its part of ``dq``, added.

    ``ranges [batch or 1, key tiles, 4]`` holds the query rows ``first, full, ragged, last``: those in ``[first, last)``
    see some key of the tile, those in ``[full, ragged)`` all of it (:func:`fused.triton_ranges.query_ranges`).
    """
    key = tl.program_id(0) * BLOCK_K
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    k_tile = load_rows(k, k_strides, batch, kv_head, key, keys, BLOCK_K, WIDTH_K, DK, True)
    v_tile = load_rows(v, v_strides, batch, kv_head, key, keys, BLOCK_K, WIDTH_V, DV, True)
    dk_tile = tl.zeros((BLOCK_K, WIDTH_K), tl.float32)
    dv_tile = tl.zeros((BLOCK_K, WIDTH_V), tl.float32)
    bounds = ranges + batch * ranges_stride + tl.program_id(0) * 4
    first, full, ragged, last = tl.load(bounds), tl.load(bounds + 1), tl.load(bounds + 2), tl.load(bounds + 3)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        if SPLIT:
            dk_tile, dv_tile = gather_queries(
                dk_tile, dv_tile, k_tile, v_tile, q, d_out, lse, delta, start, stop, dq,
                q_strides, d_out_strides, lse_strides, mask_stride, dq_strides, batch, head, key, first, full, queries,
                keys, scale, dropout, BLOCK_Q, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, SHARE_DQ, PRECISION,
            )  # fmt: skip
            dk_tile, dv_tile = gather_queries(
                dk_tile, dv_tile, k_tile, v_tile, q, d_out, lse, delta, start, stop, dq,
                q_strides, d_out_strides, lse_strides, mask_stride, dq_strides, batch, head, key, full, ragged, queries,
                keys, scale, dropout, BLOCK_Q, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, False, SHARE_DQ, PRECISION,
            )  # fmt: skip
            dk_tile, dv_tile = gather_queries(
                dk_tile, dv_tile, k_tile, v_tile, q, d_out, lse, delta, start, stop, dq,
                q_strides, d_out_strides, lse_strides, mask_stride, dq_strides, batch, head, key, ragged, last, queries,
                keys, scale, dropout, BLOCK_Q, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, SHARE_DQ, PRECISION,
            )  # fmt: skip
        else:
            dk_tile, dv_tile = gather_queries(
                dk_tile, dv_tile, k_tile, v_tile, q, d_out, lse, delta, start, stop, dq,
                q_strides, d_out_strides, lse_strides, mask_stride, dq_strides, batch, head, key, first, last, queries,
                keys, scale, dropout, BLOCK_Q, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, SHARE_DQ, PRECISION,
            )  # fmt: skip
    store_rows(dk, dk_tile * scale, dk_strides, batch, kv_head, key, keys, BLOCK_K, WIDTH_K, DK, ADD)
    store_rows(dv, dv_tile, dv_strides, batch, kv_head, key, keys, BLOCK_K, WIDTH_V, DV, ADD)


@triton.jit
def gather_keys(
    dq, q_tile, d_tile, row_lse, row_delta, start, stop, k, v, k_strides, v_strides, batch, head, first, last, keys,
    scale, dropout, bits,
    BLOCK_K: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to ``dq`` (unscaled) what the keys ``[first, last)`` give this tile of queries."""
    for key in tl.range(first, last, BLOCK_K):
        k_tile = load_rows(k, k_strides, batch, head, key, keys, BLOCK_K, WIDTH_K, DK, MASKED)
        v_tile = load_rows(v, v_strides, batch, head, key, keys, BLOCK_K, WIDTH_V, DV, MASKED)
        _, ds = score_gradients(
            q_tile, k_tile, v_tile, d_tile, row_lse, row_delta, start, stop, key, keys, scale, dropout, bits,
            BLOCK_K, MASKED, PRECISION,
        )  # fmt: skip
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["dropout"])
def query_kernel(
    q, k, v, d_out, lse, delta, start, stop, dq,
    q_strides, k_strides, v_strides, d_out_strides, lse_strides, mask_stride, dq_strides, queries, keys, scale,
    dropout, HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, ADD: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``dq`` of a tile of queries; with ADD, added to what it holds. No other program writes there."""
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    rows = row + tl.arange(0, BLOCK_Q)
    in_range = rows < queries
    q_tile = load_rows(q, q_strides, batch, head, row, queries, BLOCK_Q, WIDTH_K, DK, True)
    d_tile = load_rows(d_out, d_out_strides, batch, head, row, queries, BLOCK_Q, WIDTH_V, DV, True)
    row_lse, row_delta = row_statistics(lse, delta, lse_strides, batch, head, row, queries, BLOCK_Q)
    row_start = tl.load(start + batch * mask_stride + rows, mask=in_range, other=0)
    row_stop = tl.load(stop + batch * mask_stride + rows, mask=in_range, other=0)
    first, full, ragged, last = key_ranges(row_start, row_stop, in_range, keys, BLOCK_K)
    kv_head = head // GROUP
    bits = row_bits(dropout, batch, head, row, queries, BLOCK_Q)
    acc = tl.zeros((BLOCK_Q, WIDTH_K), tl.float32)
    if SPLIT:
        acc = gather_keys(
            acc, q_tile, d_tile, row_lse, row_delta, row_start, row_stop, k, v, k_strides, v_strides, batch, kv_head,
            first, full, keys, scale, dropout, bits, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, PRECISION,
        )  # fmt: skip
        acc = gather_keys(
            acc, q_tile, d_tile, row_lse, row_delta, row_start, row_stop, k, v, k_strides, v_strides, batch, kv_head,
            full, ragged, keys, scale, dropout, bits, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, False, PRECISION,
        )  # fmt: skip
        acc = gather_keys(
            acc, q_tile, d_tile, row_lse, row_delta, row_start, row_stop, k, v, k_strides, v_strides, batch, kv_head,
            ragged, last, keys, scale, dropout, bits, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, PRECISION,
        )  # fmt: skip
    else:
        acc = gather_keys(
            acc, q_tile, d_tile, row_lse, row_delta, row_start, row_stop, k, v, k_strides, v_strides, batch, kv_head,
            first, last, keys, scale, dropout, bits, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, PRECISION,
        )  # fmt: skip
    store_rows(dq, acc * scale, dq_strides, batch, head, row, queries, BLOCK_Q, WIDTH_K, DK, ADD)

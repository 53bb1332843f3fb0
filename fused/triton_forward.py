"""Block attention forward: the online softmax of FlashAttention-2 (arXiv 2307.08691, algorithm 1), carried over blocks.

Scores are kept in units of log 2, since the hardware's exponential is ``exp2``.
"""

# The kernels are Triton's language, which a checker of Python takes for Python: constants are not constexpr to it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

import triton
import triton.language as tl

from fused.triton_dropout import dropped, row_bits
from fused.triton_tiles import INFINITY, LN_2, LOG2_E, key_ranges, load_rows, store_rows, visible


@triton.jit
def attend(
    acc, peak, total, q, k, v, k_strides, v_strides, batch, head, start, stop, first, last, keys, scale, dropout, bits,
    BLOCK_K: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax over the keys ``[first, last)``: unnormalised ``acc``, running maximum and sum of each row."""
    for key in tl.range(first, last, BLOCK_K):
        k_tile = load_rows(k, k_strides, batch, head, key, keys, BLOCK_K, WIDTH_K, DK, MASKED)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(visible(start, stop, key, BLOCK_K), scores, -INFINITY)
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
        shift = tl.where(new_peak == -INFINITY, 0.0, new_peak) if MASKED else new_peak
        p = tl.exp2(scores * scale - shift[:, None])
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(p, 1)
        if dropout is not None:
            p = dropped(p, bits, dropout, key, keys, BLOCK_K)
        v_tile = load_rows(v, v_strides, batch, head, key, keys, BLOCK_K, WIDTH_V, DV, MASKED)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * decay[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["dropout"])
def forward_kernel(
    q, k, v, out, lse, start, stop,
    q_strides, k_strides, v_strides, out_strides, lse_strides, mask_stride, queries, keys, scale, dropout,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, CARRY: tl.constexpr,
    SPLIT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, WIDTH_K: tl.constexpr, WIDTH_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``out`` and ``lse`` of a tile of queries over this block's keys; with CARRY, over those already in them as well.

    A carried state is an online softmax that has seen other keys: its maximum is lse, its sum 1, its accumulator out.
    So the merge costs no launch and reads and writes out once. ``scale`` holds log2(e).
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q  # the longest rows of a causal mask start first
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    rows = row + tl.arange(0, BLOCK_Q)
    in_range = rows < queries
    q_tile = load_rows(q, q_strides, batch, head, row, queries, BLOCK_Q, WIDTH_K, DK, True)
    row_start = tl.load(start + batch * mask_stride + rows, mask=in_range, other=0)
    row_stop = tl.load(stop + batch * mask_stride + rows, mask=in_range, other=0)
    statistics = lse + batch.to(tl.int64) * lse_strides[0] + rows * lse_strides[1] + head * lse_strides[2]
    if CARRY:
        peak = tl.load(statistics, mask=in_range, other=-INFINITY) * LOG2_E
        total = tl.full((BLOCK_Q,), 1.0, tl.float32)  # and of an empty state 1 * exp(-inf)
        acc = load_rows(out, out_strides, batch, head, row, queries, BLOCK_Q, WIDTH_V, DV, True)
    else:
        peak = tl.full((BLOCK_Q,), -INFINITY, tl.float32)
        total = tl.zeros((BLOCK_Q,), tl.float32)
        acc = tl.zeros((BLOCK_Q, WIDTH_V), tl.float32)

    first, full, ragged, last = key_ranges(row_start, row_stop, in_range, keys, BLOCK_K)
    kv_head = head // GROUP
    bits = row_bits(dropout, batch, head, row, queries, BLOCK_Q)
    if SPLIT:
        acc, peak, total = attend(
            acc, peak, total, q_tile, k, v, k_strides, v_strides, batch, kv_head, row_start, row_stop, first, full,
            keys, scale, dropout, bits, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, PRECISION,
        )  # fmt: skip
        acc, peak, total = attend(
            acc, peak, total, q_tile, k, v, k_strides, v_strides, batch, kv_head, row_start, row_stop, full, ragged,
            keys, scale, dropout, bits, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, False, PRECISION,
        )  # fmt: skip
        acc, peak, total = attend(
            acc, peak, total, q_tile, k, v, k_strides, v_strides, batch, kv_head, row_start, row_stop, ragged, last,
            keys, scale, dropout, bits, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, PRECISION,
        )  # fmt: skip
    else:
        acc, peak, total = attend(
            acc, peak, total, q_tile, k, v, k_strides, v_strides, batch, kv_head, row_start, row_stop, first, last,
            keys, scale, dropout, bits, BLOCK_K, WIDTH_K, WIDTH_V, DK, DV, True, PRECISION,
        )  # fmt: skip

    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    acc = acc / total[:, None]
    store_rows(out, acc, out_strides, batch, head, row, queries, BLOCK_Q, WIDTH_V, DV, False)
    tl.store(statistics, tl.where(seen, (peak + tl.log2(total)) * LN_2, -INFINITY), mask=in_range)

"""Merge any number of partial attention results in one launch: each is read once, the result written once."""

# The kernels are Triton's language, which a checker of Python takes for Python: constants are not constexpr to it.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOperatorIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused.triton_launch import Launch, padded, strides
from fused.triton_tiles import INFINITY

BLOCK = 32  # rows of one program


@triton.jit
def merge_kernel(
    parts, part_lses, out, lse, out_strides, lse_strides, count, PARTS: tl.constexpr,
    HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Merge contiguous ``parts [batch, rows, heads, D]`` into the running ``out`` and ``lse``, of any strides.

    A program takes ROWS of the ``count = rows * heads`` vectors of one batch row. Weights are ``exp(lse - max)``, so an
    empty side (lse -inf) counts for nothing and a row that is empty everywhere stays so.
    """
    batch = tl.cast(tl.program_id(1), tl.int64)
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    there = index < count
    mask = there[:, None] & (column < D)[None, :]
    row, head = index // HEADS, index % HEADS
    statistics = lse + batch * lse_strides[0] + row * lse_strides[1] + head * lse_strides[2]
    vectors = out + batch * out_strides[0] + (tl.cast(row, tl.int64) * out_strides[1] + head * out_strides[2])[:, None]
    running = tl.load(statistics, mask=there, other=-INFINITY)

    peak = running
    for part in tl.static_range(PARTS):
        peak = tl.maximum(peak, tl.load(part_lses[part] + batch * count + index, mask=there, other=-INFINITY))
    shift = tl.where(peak == -INFINITY, 0.0, peak)
    total = tl.exp(running - shift)
    acc = total[:, None] * tl.load(vectors + column[None, :], mask=mask, other=0.0)
    for part in tl.static_range(PARTS):
        weight = tl.exp(tl.load(part_lses[part] + batch * count + index, mask=there, other=-INFINITY) - shift)
        tile = parts[part] + batch * count * D + (tl.cast(index, tl.int64) * D)[:, None] + column[None, :]
        acc += weight[:, None] * tl.load(tile, mask=mask, other=0.0).to(tl.float32)
        total += weight
    seen = total > 0.0
    total = tl.where(seen, total, 1.0)
    tl.store(vectors + column[None, :], acc / total[:, None], mask=mask)
    tl.store(statistics, tl.where(seen, shift + tl.log(total), -INFINITY), mask=there)


def merge_launch(out: Tensor, lse: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> Launch:
    """The launch that folds ``parts`` (each an ``(out, lse)``) into the running ``out`` and ``lse``."""
    batch, rows, heads, width = out.shape
    sides = [[x.contiguous() for x in side] for side in zip(*parts, strict=True)]
    return Launch(
        merge_kernel,
        (triton.cdiv(rows * heads, BLOCK), batch),
        (tuple(sides[0]), tuple(sides[1]), out, lse, strides(out), strides(lse), rows * heads),
        {
            "PARTS": len(parts),
            "HEADS": heads,
            "D": width,
            "WIDTH": padded(width),
            "ROWS": BLOCK,
            "num_warps": 4,
        },
    )


def merge_(out: Tensor, lse: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Fold partial results into the running one, in place.

    ``out [batch, rows, heads, width]`` and ``lse [batch, rows, heads]`` are fp32; partial outputs may be narrower.
    """
    assert out.dtype == lse.dtype == torch.float32, "the running state is fp32"
    if parts and out.numel():
        merge_launch(out, lse, parts).run()

"""Block attention on a GPU: FlashAttention where it is installed and knows the block, else the Triton kernels."""

from torch import Tensor

from fused import flash, triton_block
from fused.dropout import Dropout
from fused.mask import BlockMask
from fused.triton_block import Block, Upstream
from fused.triton_merge import merge_


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    into: tuple[Tensor, Tensor] | None,
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`fused.block.block_forward`."""
    found = flash.find(q, v, mask) if dropout is None else None
    if found is None:
        return triton_block.forward(Block(q, k, v, mask, scale, dropout), into)
    library, causal = found
    out, lse = library.forward(q, k, v, scale, causal)
    if into is None:
        return out.float(), lse.contiguous()
    merge_(*into, [(out, lse)])
    return into


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
    dropout: Dropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`fused.block.block_backward`."""
    found = flash.find(q, v, mask) if dropout is None else None
    if found is None:
        return triton_block.backward(Block(q, k, v, mask, scale, dropout), Upstream(d_out, lse, delta), dq, dkv)
    library, causal = found
    parts = library.backward(q, k, v, d_out, lse, delta, scale, causal)
    totals = (dq, *(dkv if dkv is not None else (None, None)))
    dq, dk, dv = (
        part.float() if total is None else total.add_(part) for total, part in zip(totals, parts, strict=True)
    )
    return dq, dk, dv

"""The one attention primitive under every sequence-parallel strategy: a block forward and a block backward.

Shapes: queries ``[batch, Sq, heads, D]``, keys ``[batch, Sk, kv_heads, D]``, values ``[batch, Sk, kv_heads, Dv]`` with
``heads`` a multiple of ``kv_heads`` (query head ``h`` reads key head ``h // (heads // kv_heads)``), out
``[batch, Sq, heads, Dv]``, lse and delta ``[batch, Sq, heads]``. Results are fp32 (fp64 for fp64 inputs) whatever the
inputs are.

The arithmetic is FlashAttention-2's (arXiv 2307.08691): partial results are normalised, carry the natural log-sum-exp
of their scores and merge exactly; the gradients of a block need only the global lse and
``delta = rowsum(d_out * out)``, so they sum over blocks without another correction.
"""

from types import ModuleType

import torch
from torch import Tensor

from conf.errors import ResourceError
from fused import cpu, reference
from fused.dropout import Dropout
from fused.mask import BlockMask
from fused.merge import merge_


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of out, lse and gradients while they are being summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(*tensors: Tensor) -> list[Tensor]:
    return [x.to(accumulation_dtype(x.dtype)) for x in tensors]


def _on_gpu(q: Tensor) -> bool:
    """Is this a block for GPU kernels? fp64 is not: it is for checking, by the reference."""
    return q.device.type == "cuda" and q.dtype != torch.float64


def _gpu() -> ModuleType:
    try:
        from fused import gpu

        return gpu
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        rule, fix = "attention on a GPU runs in Triton kernels", "pip install 'sundog[gpu]'"
        raise ResourceError("triton", "not installed", rule, fix) from error


def block_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
    dropout: Dropout | None = None,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale * q k^T) v`` over the keys of this block, and its log-sum-exp.

    With ``into`` (running out and lse of the same queries) the result is merged into it in place and ``into`` is
    returned; without, fresh tensors are. A query that sees no key has out 0 and lse -inf. ``dropout`` acts on the
    weights after the softmax; the log-sum-exp knows nothing of it.
    """
    if _on_gpu(q):
        return _gpu().forward(q, k, v, mask, scale, into, dropout)
    q, k, v = _wide(q, k, v)
    if q.device.type == "cpu" and dropout is None:
        return cpu.forward(q, k, v, mask, scale, into)
    out, lse = reference.forward(q, k, v, mask, scale, dropout)
    if into is None:
        return out, lse
    merge_(*into, out, lse)
    return into


def block_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    lse: Tensor,
    delta: Tensor,
    mask: BlockMask,
    scale: float,
    dq: Tensor | None = None,
    dkv: tuple[Tensor, Tensor] | None = None,
    dropout: Dropout | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """This block's share of ``(dq, dk, dv)``, added in place to the totals that are given.

    ``lse`` and ``delta`` are the queries' global ones (over all keys of the sequence), not this block's; so is ``out``,
    which is never needed but saves work on a CPU where it is at hand.
    """
    if _on_gpu(q):
        return _gpu().backward(q, k, v, d_out, lse, delta, mask, scale, dq, dkv, dropout)
    q, k, v, d_out = _wide(q, k, v, d_out)
    if q.device.type == "cpu" and dropout is None:
        return cpu.backward(q, k, v, d_out, lse, delta, mask, scale, dq, dkv, None if out is None else _wide(out)[0])
    parts = reference.backward(q, k, v, d_out, lse, delta, mask, scale, dropout)
    totals = (dq, *(dkv if dkv is not None else (None, None)))
    dq_total, dk_total, dv_total = (
        part if total is None else total.add_(part) for total, part in zip(totals, parts, strict=True)
    )
    return dq_total, dk_total, dv_total

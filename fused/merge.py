"""Merge partial attention results by their log-sum-exp."""

import torch
from torch import Tensor


def merge_(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> None:
    """Fold a partial result into the running one, in place.

    ``out`` and ``block_out`` are ``[..., head_dim]``, ``lse`` and ``block_lse`` the same without the last dim. With
    ``l = log(exp(lse) + exp(block_lse))`` the result is ``out*exp(lse-l) + block_out*exp(block_lse-l)``, written as one
    interpolation. An empty side (lse -inf, any finite out) has weight 0; two empty sides stay empty instead of turning
    into NaN.
    """
    if out.is_cuda and out.dtype == torch.float32:
        from fused import triton_merge  # Triton is there only where there is a GPU

        triton_merge.merge_(out, lse, [(block_out, block_lse)])
        return
    total = torch.logaddexp(lse, block_lse)
    weight = (block_lse - total).exp_()
    weight.masked_fill_(total == -torch.inf, 0.0)
    out.lerp_(block_out.to(out.dtype), weight.unsqueeze(-1))
    lse.copy_(total)

"""RMSNorm and rotary positions on a CPU, forward and backward, each in a few passes over memory.

As plain expressions they take most of the time that a decoder's training step spends outside matrix products and
attention: torch makes a pass and a new tensor of every operation, and its autograd as many again. The norm works on a
block of rows that stays in the cache from the first pass to the last; the rotation turns whole heads at once. Autograd
keeps their inputs alone. On other devices, and for tests to compare with, there are the plain expressions.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 2**16  # numbers of a tensor that are worked on at a time: 256 KiB in fp32
SHARE = 2**17  # of a thread, where there are several: each operation on a block ends with all of them waiting


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dim (arXiv:1910.07467, equation 4), in the dtype of ``x``.

    Computed in fp32 at least.
    """
    if x.device.type != "cpu" or x.dtype != weight_D.dtype:
        return plain_rms_norm(x, weight_D, eps)
    out = _RMSNorm.apply(x, weight_D, eps)
    assert isinstance(out, Tensor)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + D / 2) of the last dim of ``x``; computed in fp32 at least, returned in its own dtype.

    Args:
        x: [batch, sequence, heads, D].
        cos: [batch or 1, sequence, 1, D / 2], fp32, without gradient.
        sin: as ``cos``.
    """
    if x.device.type != "cpu":
        return plain_rotate(x, cos, sin)
    out = _Rotate.apply(x, cos, sin)
    assert isinstance(out, Tensor)
    return out


def plain_rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The twin of :func:`rms_norm`."""
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The twin of :func:`rotate`."""
    first, second = x.to(_exact(x)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _blocks(x_RD: Tensor) -> Iterator[slice]:
    threads = torch.get_num_threads()
    rows = max(1, (BLOCK if threads == 1 else SHARE * threads) // x_RD.shape[1])
    for start in range(0, x_RD.shape[0], rows):
        yield slice(start, start + rows)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x_RD, exact = x.reshape(-1, x.shape[-1]), _exact(x)
        wide_D = weight_D.to(exact)
        out_RD = torch.empty_like(x_RD)
        scale_R1 = torch.empty(x_RD.shape[0], 1, dtype=exact)
        for rows in _blocks(x_RD):
            part, scale = x_RD[rows].to(exact), scale_R1[rows]
            torch.mean(part * part, 1, keepdim=True, out=scale).add_(eps).rsqrt_()
            torch.mul(part * scale, wide_D, out=out_RD[rows])
        ctx.save_for_backward(x_RD, weight_D, scale_R1)
        return out_RD.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x_RD, weight_D, scale_R1 = ctx.saved_tensors
        d_RD, exact = grads[0].reshape(x_RD.shape), scale_R1.dtype
        wide_D = weight_D.to(exact)
        d_x = torch.empty_like(x_RD)
        d_weight = torch.zeros_like(wide_D)
        for rows in _blocks(x_RD):
            d, scale = d_RD[rows].to(exact), scale_R1[rows]
            unit = x_RD[rows].to(exact) * scale
            along = d * unit
            d_weight += along.sum(0)
            # With u = x scale: d x = scale (d w - u mean(d w u))
            mean = torch.mv(along, wide_D)[:, None].div_(-x_RD.shape[1])
            torch.mul((d * wide_D).addcmul_(unit, mean), scale, out=d_x[rows])
        return d_x.view(grads[0].shape), d_weight.to(weight_D.dtype), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, -sin), None, None


def _turned(x_BSHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    wide, half = x_BSHD.to(_exact(x_BSHD)), x_BSHD.shape[-1] // 2
    out = wide * torch.cat((cos, cos), -1)  # whole heads at once, twice as fast as their halves
    out[..., :half].addcmul_(wide[..., half:], sin, value=-1)
    out[..., half:].addcmul_(wide[..., :half], sin)
    return out.to(x_BSHD.dtype)

"""Norms, rotations and sums of exponentials of a decoder that is only read: one pass over each row, on one core.

``fused.rows`` makes several passes and keeps what a backward pass needs, and torch writes exponentials to memory;
between the small products of a ladder's models that is a third of the time. Tests compare with both.
"""

import math
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.norm import RMSNorm
from models.rope import Rotation

Array = npt.NDArray[Any]
BLOCK = 1024  # exponentials at once: they stay in a core's first cache
TO_INTEGER = np.float32(1.5 * 2**23)  # a number of fp32 plus this is rounded, and its last bits are the integer
LOG2_E, LOG2_E_REST = np.float32(np.log2(np.e)), np.float32(np.log2(np.e) - float(np.float32(np.log2(np.e))))
# 2^x for |x| <= 1/2, from x^6 down to x; to 1e-7 of it (the Taylor series, whose rest is below)
POWERS = tuple(np.float32(np.log(2) ** n / math.factorial(n)) for n in range(6, 0, -1))


def one_pass_norms(model: nn.Module) -> None:
    """Lets every RMSNorm of the model work in one pass."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, RMSNorm):
                setattr(parent, name, OnePassNorm(child))


class OnePassNorm(nn.Module):
    """An RMSNorm without gradient."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self._weight: Array = norm.weight.detach().numpy()
        number = self._weight.dtype.type
        self._eps, self._size = number(norm.eps), number(len(self._weight))

    def forward(self, x: Tensor) -> Tensor:
        """[..., dim] to the same shape."""
        rows = x.detach().contiguous().view(-1, len(self._weight))
        out = torch.empty_like(rows)
        normalise(rows.numpy(), self._weight, self._eps, self._size, out.numpy())
        return out.view(x.shape)


@dataclass(frozen=True)
class OnePassRotation(Rotation):
    """A rotation without gradient."""

    def apply(self, x_BSHD: Tensor) -> Tensor:
        """Turn every head of ``x`` [1, S, heads, head_dim]."""
        x, cos, sin = (part.detach().contiguous()[0] for part in (x_BSHD, self.cos, self.sin))
        out = torch.empty_like(x)
        _turn(x.numpy(), cos[:, 0].numpy(), sin[:, 0].numpy(), out.numpy())
        return out[None]


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def normalise(rows: Array, weight: Array, eps: float, size: float, out: Array) -> None:
    for row in range(rows.shape[0]):
        total = eps * size
        for dim in range(rows.shape[1]):
            total += rows[row, dim] * rows[row, dim]
        scale = np.sqrt(size / total)
        for dim in range(rows.shape[1]):
            out[row, dim] = rows[row, dim] * scale * weight[dim]


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _turn(x: Array, cos: Array, sin: Array, out: Array) -> None:
    half = x.shape[2] // 2
    for place in range(x.shape[0]):
        for head in range(x.shape[1]):
            for dim in range(half):
                first, second = x[place, head, dim], x[place, head, dim + half]
                out[place, head, dim] = first * cos[place, dim] - second * sin[place, dim]
                out[place, head, dim + half] = second * cos[place, dim] + first * sin[place, dim]


def sum_exponentials(x_NV: Tensor) -> Tensor:
    """The sum of the exponentials of each row, fp64 ``[N]``; for fp32 numbers of at most 80, either sign.

    Uses up ``x_NV``. Relative error below 1e-6.
    """
    bits, sums = np.empty(BLOCK, dtype=np.int32), np.empty(len(x_NV), dtype=np.float64)
    _sum_rows(x_NV.detach().numpy(), bits, bits.view(np.float32), sums)
    return torch.from_numpy(sums)


@numba.njit(cache=True)
def _sum_rows(x: Array, bits: Array, scale: Array, sums: Array) -> None:
    for row in range(x.shape[0]):
        total = 0.0
        for first in range(0, x.shape[1], BLOCK):
            part = x[row, first : first + BLOCK]
            _split_powers(part, bits[: len(part)], scale[: len(part)])
            total += _dot(part, scale[: len(part)])
        sums[row] = total


@numba.njit(cache=True, fastmath={"contract", "nsz"})
def _split_powers(x: Array, bits: Array, scale: Array) -> None:
    """``exp(x) = 2^n * 2^f``: 2^f takes the place of x, and 2^n that of ``scale``, which is ``bits`` as fp32."""
    c6, c5, c4, c3, c2, c1 = POWERS
    for i in range(len(x)):
        scale[i] = x[i] * LOG2_E + TO_INTEGER
    for i in range(len(x)):  # apart, as the product may only then stay unrounded inside a fused multiply-add
        f = (x[i] * LOG2_E - (scale[i] - TO_INTEGER)) + x[i] * LOG2_E_REST
        x[i] = ((((((c6 * f + c5) * f + c4) * f + c3) * f + c2) * f) + c1) * f + np.float32(1)
    for i in range(len(x)):
        bits[i] = (bits[i] - np.int32(0x4B400000) + np.int32(127)) << np.int32(23)


@numba.njit(cache=True, fastmath={"reassoc", "contract", "nsz"})
def _dot(x: Array, y: Array) -> Any:
    total = np.float32(0)
    for i in range(len(x)):
        total += x[i] * y[i]
    return total

"""Norms and rotations of a decoder that is only read: one pass over each row, on one core.

``fused.rows`` makes several passes and keeps what a backward pass needs; between the small products of a ladder's
models that is a fifth of the time. Tests compare with it.
"""

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

"""FlashAttention-3 (``flash_attn_interface``, sm_90) or -4 (``flash_attn.cute``, sm_100) for a block, if installed.

They know fewer blocks than the Triton kernels: 16-bit inputs, a full or a causal mask, no dropout; and they round the
output to the inputs' dtype. Their backward asks for the output. Version 4 takes the gradient of lse beside it, which
enters as ``delta - d_lse``: zeros and ``d_lse = -delta`` say what is meant. Version 3 gets an output with the right row
sums, since it uses the output for nothing else.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fused.mask import BlockMask

WIDEST = 128


def causal(mask: BlockMask) -> bool | None:
    """False for a full mask, True for a causal one whose last query sees the last key, None for any other."""
    queries, keys = mask.start.shape[1], mask.keys
    if keys == 0 or mask.start.any():
        return None
    if (mask.stop == keys).all():
        return False
    return True if queries <= keys and (mask.stop == np.arange(queries) + keys - queries + 1).all() else None


class Flash(ABC):
    """The two calls of one version; q, k, v as in :mod:`fused.block`, statistics ``[batch, Sq, heads]`` in fp32."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """``(out, lse)``, out in the dtype of the inputs."""

    @abstractmethod
    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``(dq, dk, dv)`` in the dtype of the inputs."""


class Flash3(Flash):
    def __init__(self, module: Any) -> None:
        self._forward: Callable[..., Any] = module._flash_attn_forward
        self._backward: Callable[..., Any] = module._flash_attn_backward

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(q, k, v, softmax_scale=scale, causal=causal)
        return out, lse.transpose(1, 2)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        gradients = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        self._backward(
            *(d_out, q, k, v, output_with(d_out, delta), _heads_first(lse)),
            **dict(zip(("dq", "dk", "dv"), gradients, strict=True)),
            softmax_scale=scale,
            is_causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return gradients


class Flash4(Flash):
    def __init__(self, module: Any) -> None:
        self._forward: Callable[..., Any] = module._flash_attn_fwd
        self._backward: Callable[..., Any] = module._flash_attn_bwd

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(q, k, v, softmax_scale=scale, causal=causal, return_lse=True)
        return out, lse.transpose(1, 2)

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv, *_ = self._backward(
            *(q, k, v, torch.zeros_like(d_out), d_out, _heads_first(lse)),
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            dlse=-_heads_first(delta),
        )
        return dq, dk, dv


def output_with(d_out: Tensor, delta: Tensor) -> Tensor:
    """An output whose ``rowsum(d_out * out)`` is ``delta``: ``d_out * delta / |d_out|^2``, scaled against underflow.

    All terms of the sum have one sign, so rounding them to 16 bits leaves it as exact as they are.
    """
    peak = d_out.abs().amax(-1, keepdim=True).float()
    unit = d_out / torch.where(peak == 0, 1.0, peak)
    factor = delta.unsqueeze(-1) / torch.where(peak == 0, 1.0, peak * unit.square().sum(-1, keepdim=True))
    return (unit * factor).to(d_out.dtype)


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous()


VERSIONS: dict[int, tuple[str, type[Flash3] | type[Flash4]]] = {
    9: ("flash_attn_interface", Flash3),
    10: ("flash_attn.cute.interface", Flash4),
}


@lru_cache
def installed(major: int) -> Flash | None:
    """The version for GPUs of this major compute capability, if it is installed."""
    if torch.version.hip is not None or major not in VERSIONS:
        return None
    name, version = VERSIONS[major]
    if find_spec(name.partition(".")[0]) is None:
        return None
    try:
        return version(import_module(name))
    except ImportError:  # an older flash_attn, which has no cute
        return None


def find(q: Tensor, v: Tensor, mask: BlockMask) -> tuple[Flash, bool] | None:
    """The FlashAttention that can compute a block on the device of ``q``, and whether the block is causal."""
    if (
        q.dtype not in (torch.bfloat16, torch.float16)
        or max(q.shape[3], v.shape[3]) > WIDEST
        or q.shape[3] != v.shape[3]
    ):
        return None
    flash = installed(torch.cuda.get_device_capability(q.device)[0])
    kind = None if flash is None else causal(mask)
    return None if flash is None or kind is None else (flash, kind)

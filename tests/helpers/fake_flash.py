"""Stand-ins for the two FlashAttention modules: their signatures, computed by the reference, bf16 in and out."""

from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from fused import reference
from fused.mask import CAUSAL, FULL, BlockMask


def _mask(q: Tensor, k: Tensor, causal: bool) -> BlockMask:
    """Right-aligned, as theirs: the last query is at the last key."""
    keys = np.arange(k.shape[1])
    queries = np.arange(k.shape[1] - q.shape[1], k.shape[1]) if causal else np.arange(q.shape[1])
    return BlockMask.of((CAUSAL if causal else FULL).ranges(queries, k.shape[1]), queries, keys)


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    out, lse = reference.forward(q.float(), k.float(), v.float(), _mask(q, k, causal), scale)
    return out.to(q.dtype), lse.transpose(1, 2).contiguous()


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, d_out: Tensor, lse: Tensor, d_lse: Tensor | float, scale: float,
    causal: bool,
) -> list[Tensor]:  # fmt: skip
    """Gradients as theirs: delta is made from the output, and the gradient of lse is taken from it."""
    assert out.dtype == d_out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])
    assert lse.is_contiguous()
    delta = (out.float() * d_out.float()).sum(-1).transpose(1, 2) - d_lse
    lse, delta = lse.transpose(1, 2), delta.transpose(1, 2)
    wide = [x.float() for x in (q, k, v, d_out)]
    gradients = reference.backward(wide[0], wide[1], wide[2], wide[3], lse, delta, _mask(q, k, causal), scale)
    return [x.to(q.dtype) for x in gradients]


def flash3() -> SimpleNamespace:
    def forward(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return *_forward(q, k, v, softmax_scale, causal), torch.tensor([]), torch.tensor([])

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, *, dq: Tensor, dk: Tensor,
        dv: Tensor, softmax_scale: float, is_causal: bool, deterministic: bool,
    ) -> Tensor:  # fmt: skip
        parts = _backward(q, k, v, out, dout, softmax_lse, 0.0, softmax_scale, is_causal)
        for room, part in zip((dq, dk, dv), parts, strict=True):
            assert room.is_contiguous()
            room.copy_(part)
        return softmax_lse

    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


def flash4() -> SimpleNamespace:
    def forward(
        q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, return_lse: bool
    ) -> tuple[Tensor, Tensor, None, None]:
        assert return_lse
        return *_forward(q, k, v, softmax_scale, causal), None, None

    def backward(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, lse: Tensor, *, softmax_scale: float, causal: bool,
        deterministic: bool, dlse: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        assert dlse.shape == lse.shape
        return _backward(q, k, v, out, dout, lse, dlse, softmax_scale, causal)

    return SimpleNamespace(_flash_attn_fwd=forward, _flash_attn_bwd=backward)

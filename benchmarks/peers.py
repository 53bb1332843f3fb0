"""Other implementations of attention over a split sequence, called on gloo ranks; forward and backward apart.

Tensors are this rank's shards of a sequence cut contiguously, ``[batch, seq, heads, head_dim]``, all pairs visible.
"""

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_cp

INSTALL = (
    "ring-attention-pytorch, another peer, is not installed: pip install --no-deps --target FOLDER "
    "ring-attention-pytorch einops beartype jaxtyping wadler_lindig, then run with PYTHONPATH=FOLDER"
)
_flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Variant:
    """One implementation on one rank's shards: ``forward`` returns out, ``backward`` dq, dk and dv of that out."""

    forward: Callable[[], Tensor]
    backward: Callable[[], list[Tensor]]


def _flash_forward(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, ...]:
    return _flash(query, key, value, 0.0, is_causal)


def _flash_gradient(**kwargs: Any) -> tuple[Tensor, ...]:
    return _flash_backward(dropout_p=0.0, **kwargs)


def torch_ring(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, rotate: str) -> Variant:
    """The ring attention of torch's context parallelism under its public door, which has no CPU path.

    ``rotate``: how keys and values come to a rank, ``alltoall`` (hop by hop around the ring) or ``allgather``.
    """
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v, d_out)]
    group: Any = dist.group.WORLD
    forward_op: Any = _flash_forward
    backward_op: Any = _flash_gradient

    def run() -> tuple[Tensor, Tensor]:
        torch_cp.set_rotate_method(rotate)
        torch_cp._cp_options.enable_load_balance = False
        out, lse = torch_cp._templated_ring_attention(group, 2, forward_op, *heads_first[:3], is_causal=False)
        return out, lse

    saved: list[tuple[Tensor, Tensor]] = []

    def forward() -> Tensor:
        saved[:] = [run()]
        return saved[0][0].transpose(1, 2)

    def backward() -> list[Tensor]:
        torch_cp.set_rotate_method(rotate)
        query, key, value, gradient = heads_first
        gradients = torch_cp._templated_ring_attention_backward(
            group, 2, backward_op, gradient, "grad_out", query, key, value, *saved[0], is_causal=False
        )
        return [x.transpose(1, 2) for x in gradients]

    return Variant(forward, backward)


def autograd(attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Variant:
    """Any differentiable function of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    saved: list[Tensor] = []

    def forward() -> Tensor:
        saved[:] = [attention(*inputs)]
        return saved[0].detach()

    def backward() -> list[Tensor]:
        return list(torch.autograd.grad(saved[0], inputs, d_out, retain_graph=True))

    return Variant(forward, backward)


def ring_attention_pytorch(q: Tensor, k: Tensor, v: Tensor, d_out: Tensor) -> Variant | None:
    """The peer of that name; None where it is not installed or does not take lengths that differ."""
    if importlib.util.find_spec("ring_attention_pytorch") is None or q.shape[1] != k.shape[1]:
        return None
    attention = importlib.import_module("ring_attention_pytorch.ring_flash_attention").ring_flash_attn

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # Its defaults: positions q, k, v, mask, causal, bucket_size, ring_reduce_col.
        return attention(query, key, value, None, False, query.shape[1], True)

    return autograd(call, q, k, v, d_out)

"""SwiGLU feed-forward layers of many experts over rows that are sorted by expert: the compute of a sparse layer.

Expert after expert, each slice small enough for the caches: no padding, no per-expert copy of the stacked weights, and
one result for any split of the experts over processes, since an expert always multiplies the same rows in one piece. On
a GPU the same layer is :mod:`fused.triton_grouped`.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused.products import add_product_, product

Weights = Sequence[tuple[Tensor, Tensor]]  # of each stack of experts: gate and up [E, 2H, D], down [E, D, H]


def grouped_swiglu(x_RD: Tensor, counts: Sequence[int], weights: Weights) -> Tensor:
    """``down(silu(gate(x)) * up(x))`` of each row's own expert, [rows, dim].

    Args:
        x_RD: rows sorted by expert, in the order in which ``weights`` lists the experts.
        counts: rows of each expert; may be 0. Their sum is the number of rows.
        weights: stacks of experts of one width.
    """
    return _call(x_RD, None, None, counts, weights)


def mix_experts(x_ND: Tensor, rows_R: Tensor, gates_R: Tensor, counts: Sequence[int], weights: Weights) -> Tensor:
    """Each token's gated sum of its experts' outputs, [tokens, dim]; zero for a token without an expert.

    Equal bit by bit to gathering ``x[rows]``, :func:`grouped_swiglu` and adding ``gates * out`` in the order of the
    rows, without the whole gathered copies.

    Args:
        x_ND: tokens.
        rows_R: the token of each row, sorted by expert as in :func:`grouped_swiglu`.
        gates_R: the weight of each row's output, in the dtype of x.
        counts: rows of each expert.
        weights: stacks of experts.
    """
    return _call(x_ND, rows_R, gates_R, counts, weights)


def _call(x: Tensor, rows: Tensor | None, gates: Tensor | None, counts: Sequence[int], weights: Weights) -> Tensor:
    flat = [weight for pair in weights for weight in pair]
    assert len(counts) == sum(stack.shape[0] for stack, _ in weights), "one count an expert"
    device = x.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        x, flat, gates = x.to(low), [w.to(low) for w in flat], None if gates is None else gates.to(low)
    with torch.autocast(device, enabled=False):
        if device == "cuda":
            from fused.triton_grouped import TritonExperts  # an optional dependency of machines with a GPU

            out = TritonExperts.apply(x, rows, gates, tuple(counts), None, *flat)
        else:
            out = _Experts.apply(x, rows, gates, tuple(counts), torch.is_grad_enabled(), *flat)
    assert isinstance(out, Tensor)
    return out


def _slices(counts: Sequence[int], flat: Sequence[Tensor]) -> Iterator[tuple[int, slice, int, int]]:
    """(index of the stack's first tensor in ``flat``, rows, expert in the stack, its count) of experts with rows."""
    start = number = 0
    for first in range(0, len(flat), 2):
        for expert in range(flat[first].shape[0]):
            count = counts[number]
            if count:
                yield first, slice(start, start + count), expert, count
            start, number = start + count, number + 1


class _Experts(torch.autograd.Function):
    """Both forms: with ``rows`` and ``gates`` (gather and weighted scatter around), and on gathered rows."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor | None,
        gates: Tensor | None,
        counts: tuple[int, ...],
        train: bool,
        *flat: Tensor,
    ) -> Tensor:
        total = sum(counts)
        kept: list[Tensor] = []  # of each expert apart: a tensor of all may be so large that its pages are always new
        out = x.new_empty(total, x.shape[1])
        mixed = None if rows is None else torch.zeros_like(x)
        for first, part, expert, _ in _slices(counts, flat):
            inputs = x[part] if rows is None else x.index_select(0, rows[part])
            gate_up = product(inputs, flat[first][expert].T)
            gate, up = gate_up.chunk(2, 1)
            active = F.silu(gate)
            hidden = active * up
            product(hidden, flat[first + 1][expert].T, out=out[part])
            if train:
                kept += (inputs, gate_up, active, hidden)
            if rows is not None and gates is not None and mixed is not None:
                mixed.index_add_(0, rows[part], out[part] * gates[part, None])
        ctx.counts, ctx.shape = counts, x.shape
        ctx.save_for_backward(rows, gates, None if rows is None else out, *flat, *kept)
        return out if mixed is None else mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, gates, out, *rest = ctx.saved_tensors
        counts, d_out = ctx.counts, grads[0].contiguous()
        weights = len(rest) - 4 * (len(counts) - counts.count(0))
        flat, kept = rest[:weights], iter(rest[weights:])
        width, most = flat[1].shape[2], max(counts, default=0)
        d_x = d_out.new_zeros(ctx.shape)
        d_gates = None if gates is None else torch.empty_like(gates)
        d_flat = [torch.zeros_like(w) if 0 in counts else torch.empty_like(w) for w in flat]
        d_gated, d_ups, d_products = d_out.new_empty(3, most, width)  # apart: halves of one are slower to work on
        d_inputs, d_outputs = d_out.new_empty(2, most, d_out.shape[1])
        for first, part, expert, count in _slices(counts, flat):
            if rows is None or gates is None or d_gates is None or out is None:
                d_rows = d_out[part]
            else:
                d_rows = torch.index_select(d_out, 0, rows[part], out=d_outputs[:count])
                torch.sum(torch.mul(d_rows, out[part], out=d_inputs[:count]), 1, out=d_gates[part])
                d_rows.mul_(gates[part, None])
            inputs, gate_up, active, hidden = itertools.islice(kept, 4)
            gate, up = gate_up.chunk(2, 1)
            d_product = product(d_rows, flat[first + 1][expert], buffer=d_products[:count])
            torch.mm(d_rows.T, hidden, out=d_flat[first + 1][expert])
            d_up = torch.mul(d_product, active, out=d_ups[:count])
            d_gate = torch.ops.aten.silu_backward.grad_input(d_product.mul_(up), gate, grad_input=d_gated[:count])
            gate_weight, up_weight = flat[first][expert].chunk(2)
            d_gate_weight, d_up_weight = d_flat[first][expert].chunk(2)
            torch.mm(d_gate.T, inputs, out=d_gate_weight)
            torch.mm(d_up.T, inputs, out=d_up_weight)
            if rows is None:
                add_product_(product(d_gate, gate_weight, out=d_x[part]), d_up, up_weight)
            else:
                d_in = product(d_gate, gate_weight, buffer=d_inputs[:count])
                d_x.index_add_(0, rows[part], add_product_(d_in, d_up, up_weight))
        return d_x, None, d_gates, None, None, *d_flat

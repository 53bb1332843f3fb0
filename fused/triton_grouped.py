"""Layers of experts in Triton: the launches of :mod:`fused.triton_experts`, and their autograd function.

The forms of :mod:`fused.grouped`, one launch for each stack of experts and kernel. Products are summed in fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from fused.triton_config import ExpertTiles, expert_tiles, target_of
from fused.triton_experts import combine_kernel, hidden_backward_kernel, hidden_kernel, product_kernel, weight_kernel
from fused.triton_launch import Launch, precision


@dataclass(frozen=True)
class Stack:
    """Consecutive experts with their weights in one tensor, and where their rows are.

    ``gate_up [E, 2H, D]``, ``down [E, D, H]``; ``table [tiles, 3]`` int32 says of each tile of rows its expert in the
    stack, its first row and the end of the expert's rows; ``starts [E + 1]`` int32 where each expert's rows begin.
    """

    gate_up: Tensor
    down: Tensor
    table: Tensor
    starts: Tensor

    @property
    def hidden(self) -> int:
        return self.down.shape[2]


@dataclass(frozen=True)
class Layer:
    """The rows of all stacks: the token of each, or None if ``x`` holds the rows themselves, and their gates."""

    x: Tensor
    rows: Tensor | None
    gates: Tensor | None
    config: ExpertTiles


def stacks(counts: Sequence[int], flat: Sequence[Tensor], block: int) -> list[Stack]:
    """Cut each stack's rows into tiles; ``counts`` are of all experts, ``flat`` lists (gate and up, down) of stacks."""
    found, first, number = [], 0, 0
    for gate_up, down in zip(flat[::2], flat[1::2], strict=True):
        starts, table = [first], []
        for expert in range(gate_up.shape[0]):
            end = first + counts[number + expert]
            table += [(expert, row, end) for row in range(first, end, block)]
            starts.append(first := end)
        number += gate_up.shape[0]
        sides = (torch.tensor(side, dtype=torch.int32).to(down.device, non_blocking=True) for side in (table, starts))
        found.append(Stack(gate_up, down, *sides))
    return found


def _options(layer: Layer, columns: int, dtype: torch.dtype, **constants: Any) -> dict[str, Any]:
    tiles = layer.config
    blocks = {"BLOCK_M": tiles.block_m, "BLOCK_N": columns, "BLOCK_K": tiles.block_k}
    return constants | blocks | {"PRECISION": precision(dtype), "num_warps": tiles.warps, "num_stages": tiles.stages}


def hidden_launch(layer: Layer, stack: Stack, hidden: Tensor, gate_up: Tensor | None) -> Launch:
    """``hidden [R, H]`` of a stack's rows, and ``gate_up [R, 2H]`` if a backward pass will need it."""
    x, weight = layer.x, stack.gate_up
    grid = (len(stack.table), triton.cdiv(stack.hidden, layer.config.swiglu_n))
    arguments = (x, layer.rows, stack.table, weight, hidden, gate_up, x.shape[1], x.stride(0), *weight.stride()[:2])
    flags = {"H": stack.hidden, "GATHER": layer.rows is not None, "KEEP": gate_up is not None}
    return Launch(hidden_kernel, grid, arguments, _options(layer, layer.config.swiglu_n, x.dtype, **flags))


def product_launch(layer: Layer, stack: Stack, x: Tensor, matrix: Tensor, out: Tensor) -> Launch:
    """``out[r] = x[r] matrix[e]`` for a stack's rows; ``matrix [E, width, columns]`` may be a transposed view."""
    _, width, columns = matrix.shape
    grid = (len(stack.table), triton.cdiv(columns, layer.config.block_n))
    arguments = (x, stack.table, matrix, out, width, columns, *matrix.stride())
    return Launch(product_kernel, grid, arguments, _options(layer, layer.config.block_n, x.dtype))


def combine_launch(x: Tensor, order: Tensor, ends: Tensor, gates: Tensor | None, out: Tensor) -> Launch:
    """``out [N, D]``: each token's sum of its rows of ``x [R, D]``; see :func:`rows_by_token`."""
    tokens, dim = out.shape
    block = min(1024, triton.next_power_of_2(dim))
    options = {"WEIGHTED": gates is not None, "BLOCK_N": block, "num_warps": 4}
    return Launch(combine_kernel, (tokens, triton.cdiv(dim, block)), (x, order, ends, gates, out, dim), options)


def hidden_backward_launch(
    layer: Layer, stack: Stack, d_out: Tensor, gate_up: Tensor, d_gate_up: Tensor, weighted: Tensor, d_gates: Tensor
) -> Launch:
    """``d_gate_up [R, 2H]``, ``weighted [R, H]`` and the parts of ``d_gates [R, column tiles]`` of a stack's rows."""
    weight, gates = stack.down, layer.gates
    grid = (len(stack.table), triton.cdiv(stack.hidden, layer.config.swiglu_n))
    arguments = (d_out, layer.rows, stack.table, weight, gate_up, gates, d_gate_up, weighted, d_gates)
    sizes = (d_out.shape[1], d_out.stride(0), *weight.stride()[:2])
    flags = {"H": stack.hidden, "GATHER": layer.rows is not None, "WEIGHTED": gates is not None}
    return Launch(
        hidden_backward_kernel, grid, arguments + sizes, _options(layer, layer.config.swiglu_n, d_out.dtype, **flags)
    )


def weight_launch(layer: Layer, stack: Stack, left: Tensor, right: Tensor, out: Tensor, gathered: str) -> Launch:
    """``out[e] [height, width]``: the gradient of a stack's matrix; the side ``gathered`` is of tokens, not of rows."""
    experts, height, width = out.shape
    config, gather = layer.config, layer.rows is not None
    grid = (triton.cdiv(height, config.block_m), triton.cdiv(width, config.block_n), experts)
    arguments = (left, right, layer.rows, stack.starts, out, height, width, left.stride(0), right.stride(0))
    sides = {"GATHER_LEFT": gather and gathered == "left", "GATHER_RIGHT": gather and gathered == "right"}
    return Launch(weight_kernel, grid, arguments, _options(layer, layer.config.block_n, left.dtype, **sides))


def rows_by_token(rows: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(the rows sorted by token, in the order of experts [R], where each token's begin [tokens + 1])."""
    order = rows.argsort(stable=True)
    ends = torch.searchsorted(rows[order], torch.arange(tokens + 1, device=rows.device))
    return order, ends


class TritonExperts(torch.autograd.Function):
    """:func:`fused.grouped.mix_experts`, and without ``rows`` and ``gates`` :func:`fused.grouped.grouped_swiglu`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor | None,
        gates: Tensor | None,
        counts: Sequence[int],
        config: ExpertTiles | None,
        *flat: Tensor,
    ) -> Tensor:
        config = config or expert_tiles(target_of(x.device), x.element_size())
        layer = Layer(x.contiguous(), rows, gates, config)
        parts, total, width = stacks(counts, flat, config.block_m), sum(counts), flat[1].shape[2]
        hidden = x.new_empty(total, width)
        gate_up = x.new_empty(total, 2 * width) if any(ctx.needs_input_grad) else None
        out = x.new_empty(total, x.shape[1])
        for part in parts:
            if len(part.table):
                hidden_launch(layer, part, hidden, gate_up).run()
                product_launch(layer, part, hidden, part.down.mT, out).run()
        by_token = None if rows is None else rows_by_token(rows, len(x))
        kept = [side for part in parts for side in (part.gate_up, part.down, part.table, part.starts)]
        ctx.save_for_backward(x, rows, gates, gate_up, *(by_token or (None, None)), *kept)
        ctx.config = config
        if by_token is None:
            return out
        mixed = torch.empty_like(x)
        combine_launch(out, *by_token, gates, mixed).run()
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, rows, gates, gate_up, order, ends, *kept = ctx.saved_tensors
        parts = [Stack(*kept[first : first + 4]) for first in range(0, len(kept), 4)]
        layer, d_out = Layer(x.contiguous(), rows, gates, ctx.config), grads[0].contiguous()
        total, double = gate_up.shape
        d_gate_up, weighted = torch.empty_like(gate_up), gate_up.new_empty(total, double // 2)
        d_rows = x.new_empty(total, x.shape[1])
        shares = x.new_empty(total, triton.cdiv(double // 2, ctx.config.swiglu_n), dtype=torch.float32)
        d_flat = []
        for part in parts:
            if len(part.table):
                hidden_backward_launch(layer, part, d_out, gate_up, d_gate_up, weighted, shares).run()
                product_launch(layer, part, d_gate_up, part.gate_up, d_rows).run()
            d_flat += [torch.empty_like(part.gate_up), torch.empty_like(part.down)]
            weight_launch(layer, part, d_gate_up, layer.x, d_flat[-2], "right").run()
            weight_launch(layer, part, d_out, weighted, d_flat[-1], "left").run()
        d_gates = None if gates is None else shares.sum(1).to(gates.dtype)
        if rows is None:
            return d_rows, None, None, None, None, *d_flat
        d_x = torch.empty_like(x)
        combine_launch(d_rows, order, ends, None, d_x).run()
        return d_x, None, d_gates, None, None, *d_flat

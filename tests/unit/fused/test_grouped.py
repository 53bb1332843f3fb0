"""Grouped SwiGLU against its readable twin: values and all gradients, any load of the experts."""

import pytest
import torch
from torch import Tensor

from fused.grouped import grouped_swiglu, mix_experts
from fused.grouped_reference import expert_swiglu, mix_experts_reference

LOADS = {"even": [6, 6, 6, 6], "skewed": [21, 2, 0, 1], "first empty": [0, 24, 0, 0], "nothing": [0, 0, 0, 0]}


def weights(dtype: torch.dtype, dim: int = 12, ffn: int = 10, sizes: tuple[int, ...] = (3, 1)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [shape for size in sizes for shape in ((size, 2 * ffn, dim), (size, dim, ffn))]
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def pairs(flat: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def separate(flat: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(a, b) for one, two in pairs(flat) for a, b in zip(one, two, strict=True)]


def chosen(counts: list[int], tokens: int) -> Tensor:
    mask = torch.zeros(tokens, len(counts), dtype=torch.bool)
    for expert, count in enumerate(counts):
        mask[torch.randperm(tokens, generator=torch.Generator().manual_seed(expert))[:count], expert] = True
    return mask


@pytest.mark.parametrize("load", LOADS)
def test_mixing_equals_its_definition_in_double_precision(load: str) -> None:
    counts, tokens = LOADS[load], 24
    generator = torch.Generator().manual_seed(0)
    mask, flat = chosen(counts, tokens), weights(torch.float64)
    x = torch.randn(tokens, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    gates = torch.rand(tokens, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    d_out = torch.randn(tokens, 12, generator=generator, dtype=torch.float64)
    ours = mix_experts(x, mask.T.nonzero()[:, 1], gates.T[mask.T], counts, pairs(flat))
    exact = mix_experts_reference(x, mask, gates, separate(flat))
    torch.testing.assert_close(ours, exact)
    inputs = [x, gates, *flat]
    for mine, other in zip(
        torch.autograd.grad(ours, inputs, d_out), torch.autograd.grad(exact, inputs, d_out), strict=True
    ):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("load", LOADS)
def test_mixing_is_bit_by_bit_gather_experts_scatter(load: str) -> None:
    counts, tokens = LOADS[load], 24
    generator = torch.Generator().manual_seed(0)
    mask, flat = chosen(counts, tokens), weights(torch.float32)
    x = torch.randn(tokens, 12, generator=generator).requires_grad_()
    gates = torch.rand(tokens, 4, generator=generator).requires_grad_()
    rows = mask.T.nonzero()[:, 1]
    whole = mix_experts(x, rows, gates.T[mask.T], counts, pairs(flat))
    out = grouped_swiglu(x[rows], counts, pairs(flat))
    parts = torch.zeros_like(x).index_add(0, rows, out * gates.T[mask.T][:, None])
    assert torch.equal(whole, parts)
    d_out = torch.randn(tokens, 12, generator=generator)
    inputs = [x, gates, *flat]
    for one, two in zip(
        torch.autograd.grad(whole, inputs, d_out), torch.autograd.grad(parts, inputs, d_out), strict=True
    ):
        assert torch.equal(one, two)


def test_rows_of_one_expert_are_a_plain_layer() -> None:
    flat = weights(torch.float64, sizes=(1,))
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(grouped_swiglu(x, [5], pairs(flat)), expert_swiglu(x, flat[0][0], flat[1][0]))


def test_an_expert_without_rows_has_a_zero_gradient_and_not_none() -> None:
    flat = weights(torch.float32)
    grouped_swiglu(torch.zeros(0, 12), [0, 0, 0, 0], pairs(flat)).sum().backward()
    assert all(w.grad is not None and not w.grad.any() for w in flat)


def test_autocast_computes_in_bf16_and_returns_gradients_in_fp32() -> None:
    flat = weights(torch.float32)
    x = torch.randn(24, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = grouped_swiglu(x, LOADS["even"], pairs(flat))
    with torch.autocast("cpu", torch.bfloat16):
        low = grouped_swiglu(x, LOADS["even"], pairs(flat))
    assert low.dtype == torch.bfloat16
    assert ((low - exact).norm() / exact.norm()).item() < 2e-2
    low.float().sum().backward()
    assert all(w.grad is not None and w.grad.dtype == torch.float32 for w in flat)

"""Block attention: split into blocks and merged, it equals the fp64 reference on the whole, forward and backward."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fused import reference
from fused.block import block_backward, block_forward
from fused.cpu import stand_in_out
from fused.dropout import Dropout
from fused.mask import CAUSAL, FULL, BlockMask, Mask
from fused.merge import merge_
from fused.tiles import IntArray

SCALE = 0.3


def _inputs(
    dtype: torch.dtype, heads: int, kv_heads: int, queries: int, keys: int, width: int = 10, value_width: int = 10
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(queries)
    shapes = [(queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, value_width)]
    shapes.append((queries, heads, value_width))
    return tuple(torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)


MASKS = {
    "full": FULL,
    "causal": CAUSAL,
    "documents": CAUSAL,
    "window": Mask(left=7, right=2),
    "prefix": Mask(right=0, prefix=20),
    "windowed documents": Mask(left=5, right=0),
}


def _mask(kind: str, queries: IntArray, keys: IntArray) -> BlockMask:
    length = int(max(queries[-1], keys[-1])) + 1
    ids = np.random.default_rng(1).integers(0, 2, (2, length)).cumsum(1) // 3 if "documents" in kind else None
    return BlockMask.of(MASKS[kind].ranges(queries, length, ids), queries, keys)


def _columns(mask: BlockMask, start: int, stop: int) -> BlockMask:
    """The mask of the keys ``[start, stop)`` alone."""
    low, high = (bound.clip(start, stop) - start for bound in (mask.start, mask.stop))
    return BlockMask(low, high, mask.query_positions, mask.key_positions[start:stop])


def _close(ours: Tensor, exact: Tensor, bound: float) -> None:
    assert torch.equal(ours.isinf(), exact.isinf())
    finite = ~exact.isinf()
    difference = (ours.double() - exact)[finite].abs().max()
    assert difference <= bound * exact[finite].abs().max().clamp_min(1.0)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("heads", "kv_heads", "width", "value_width"), [(4, 4, 10, 10), (4, 2, 12, 8), (3, 1, 8, 12)])
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)]
)
def test_blocks_add_up_to_the_whole(
    kind: str, heads: int, kv_heads: int, width: int, value_width: int, dtype: torch.dtype, bound: float
) -> None:
    queries, keys = 37, 43
    q, k, v, d_out = _inputs(dtype, heads, kv_heads, queries, keys, width, value_width)
    rows = np.arange(5, 5 + queries)
    mask = _mask(kind, rows, np.arange(keys))
    wide = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = reference.forward(*(wide[0], wide[1], wide[2]), mask, SCALE)
    delta = (d_out.double() * exact_out).sum(-1)
    gradients = reference.backward(*(wide[0], wide[1], wide[2]), d_out.double(), exact_lse, delta, mask, SCALE)

    running = None
    edges = [0, 1, 17, 30, keys]
    for a, b in pairwise(edges):
        running = block_forward(q, k[:, a:b], v[:, a:b], _columns(mask, a, b), SCALE, running)
    assert running is not None
    out, lse = running
    _close(out, exact_out, bound)
    _close(lse, exact_lse, bound)

    lse, delta = exact_lse.to(out.dtype), delta.to(out.dtype)
    dq: Tensor | None = None
    dk, dv = torch.zeros_like(gradients[1]).to(out.dtype), torch.zeros_like(gradients[2]).to(out.dtype)
    for a, b in pairwise(edges):
        block = _columns(mask, a, b)
        into = (dk[:, a:b], dv[:, a:b]) if a % 2 else None
        dq, dk_part, dv_part = block_backward(q, k[:, a:b], v[:, a:b], d_out, lse, delta, block, SCALE, dq, into)
        if into is None:
            dk[:, a:b], dv[:, a:b] = dk_part, dv_part
    assert dq is not None
    for ours, exact in zip((dq, dk, dv), gradients, strict=True):
        assert ours.dtype == out.dtype
        _close(ours, exact, bound)


@pytest.mark.parametrize("into", [False, True])
def test_rows_that_see_nothing_are_empty_not_nan(into: bool) -> None:
    q, k, v, d_out = _inputs(torch.float32, 2, 2, 6, 5)
    mask = _mask("causal", np.arange(6), np.arange(3, 8))  # the first three queries precede every key
    start = (torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf)) if into else None
    out, lse = block_forward(q, k, v, mask, SCALE, start)
    assert (lse[:, :3] == -torch.inf).all()
    assert (out[:, :3] == 0).all()
    assert torch.isfinite(lse[:, 3:]).all()
    delta = (out * d_out).sum(-1)
    dq, dk, dv = block_backward(q, k, v, d_out, lse, delta, mask, SCALE)
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))
    assert (dq[:, :3] == 0).all()
    for ours, oracle in zip((dq, dk, dv), reference.backward(q, k, v, d_out, lse, delta, mask, SCALE), strict=True):
        _close(ours, oracle.double(), 2e-6)


def test_the_reference_equals_torch_attention_and_its_autograd() -> None:
    q, k, v, d_out = _inputs(torch.float64, 4, 2, 9, 9)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    q_first, k_first, v_first = (x.transpose(1, 2) for x in inputs)
    out = torch.nn.functional.scaled_dot_product_attention(
        q_first, k_first, v_first, is_causal=True, scale=SCALE, enable_gqa=True
    ).transpose(1, 2)
    exact = torch.autograd.grad(out, inputs, d_out)
    mask = _mask("causal", np.arange(9), np.arange(9))
    ours, lse = reference.forward(q, k, v, mask, SCALE)
    assert torch.allclose(ours, out, atol=1e-13)
    delta = (out * d_out).sum(-1)
    for gradient, wanted in zip(reference.backward(q, k, v, d_out, lse, delta, mask, SCALE), exact, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-13)


def test_merge_of_empty_sides() -> None:
    inf = torch.inf
    lse = torch.tensor([-inf, -inf, 1.0, 0.0])
    block_lse = torch.tensor([-inf, 2.0, -inf, 0.0])
    out, block_out = torch.tensor([[0.0], [0.0], [3.0], [1.0]]), torch.tensor([[0.0], [5.0], [0.0], [2.0]])
    merge_(out, lse, block_out, block_lse)
    assert out.squeeze(-1).tolist() == [0.0, 5.0, 3.0, 1.5]
    assert lse.tolist() == pytest.approx([-inf, 2.0, 1.0, np.log(2.0)])


@pytest.mark.parametrize("size", [1.0, 1e-12, 1e-25, 1e-37])
def test_the_stand_in_has_the_row_sums_at_any_size(size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    d_out = torch.randn(2, 5, 3, 8, generator=generator) * size
    d_out[0, 1] = 0.0
    delta = (d_out * torch.randn(2, 5, 3, 8, generator=generator)).sum(-1)
    out = stand_in_out(d_out, delta)
    assert torch.isfinite(out).all()
    assert torch.allclose((d_out.double() * out.double()).sum(-1), delta.double(), rtol=1e-5, atol=0.0)


def test_dropout_equals_autograd_with_the_same_weights_dropped() -> None:
    q, k, v, d_out = _inputs(torch.float64, 4, 2, 9, 9)
    mask, dropout = _mask("causal", np.arange(9), np.arange(9)), Dropout(0.4, seed=3)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    keys, values = inputs[1].repeat_interleave(2, 2), inputs[2].repeat_interleave(2, 2)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * SCALE
    weights = scores.masked_fill(~mask.dense(), -torch.inf).softmax(-1)
    factors = dropout.factors(2, 4, torch.arange(9), torch.arange(9))
    exact = torch.einsum("bhqk,bkhd->bqhd", weights * factors, values)
    wanted = torch.autograd.grad(exact, inputs, d_out)
    out, lse = block_forward(q.detach(), k.detach(), v.detach(), mask, SCALE, dropout=dropout)
    assert torch.allclose(out, exact, atol=1e-7)
    delta = (out * d_out).sum(-1)
    ours = block_backward(*(q.detach(), k.detach(), v.detach()), d_out, lse, delta, mask, SCALE, dropout=dropout)
    for gradient, other in zip(ours, wanted, strict=True):
        assert torch.allclose(gradient, other, atol=1e-6)


def test_dropout_depends_on_positions_alone_and_keeps_its_rate() -> None:
    queries, keys = torch.arange(100, 400), torch.arange(300)
    whole = Dropout(0.3, seed=7).factors(2, 6, queries, keys)
    part = Dropout(0.3, seed=7, head=2).factors(1, 3, queries[50:70], keys[10:200])
    assert torch.equal(part, whole[:1, 2:5, 50:70, 10:200])
    assert (whole == 0).float().mean().item() == pytest.approx(0.3, abs=0.003)
    assert (whole == 0).float().mean((2, 3)).sub(0.3).abs().max() < 0.01
    assert whole.mean().item() == pytest.approx(1.0, abs=0.005)
    assert not torch.equal(whole, Dropout(0.3, seed=8).factors(2, 6, queries, keys))


def test_no_keys_is_an_empty_result() -> None:
    q, k, v, d_out = _inputs(torch.float32, 2, 2, 3, 0)
    mask = BlockMask.of(FULL.ranges(np.arange(3), 0), np.arange(3), np.arange(0))
    out, lse = block_forward(q, k, v, mask, SCALE)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    dq, dk, _ = block_backward(q, k, v, d_out, lse, (out * d_out).sum(-1), mask, SCALE)
    assert (dq == 0).all()
    assert dk.shape == k.shape

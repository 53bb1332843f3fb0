"""Properties of the Triton kernels under Triton's interpreter, against the fp64 reference.

Run by test_triton_interpreted.py in a process of its own: the interpreter is chosen when Triton is imported.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused import gpu, reference, triton_block, triton_merge
from fused.dropout import Dropout
from fused.flash import Flash, Flash3, Flash4
from fused.mask import CAUSAL, BlockMask, Mask
from fused.triton_block import Block, Upstream
from fused.triton_config import Tiles
from tests.helpers import fake_flash
from tests.helpers.triton_interpreter import repair

repair()
torch.set_num_threads(1)

SCALE = 0.3
# Relative Frobenius error of out and gradients, absolute error of lse. A tenth of it would mean that a test has stopped
# testing: see test_rounding_is_that_of_the_inputs.
BOUNDS = {torch.float32: (2e-6, 4e-6), torch.float16: (4e-4, 4e-6), torch.bfloat16: (3.5e-3, 4e-6)}
POISON = 12345.0


@dataclass(frozen=True)
class Case:
    batch: int
    kv_heads: int
    group: int
    width: int
    value_width: int
    queries: int
    edges: tuple[int, ...]
    order: tuple[int, ...]
    mask: str
    dtype: torch.dtype
    tiles: Tiles
    ordered: bool
    dropout: Dropout | None
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    cuts = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3, unique=True))
    edges = (0, *sorted(cuts))
    return Case(
        batch=draw(st.integers(1, 2)),
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 2)),
        width=draw(st.sampled_from([16, 24, 32])),
        value_width=draw(st.sampled_from([16, 24, 32])),
        queries=draw(st.integers(1, 60)),
        edges=edges,
        order=tuple(draw(st.permutations(range(len(edges) - 1)))),
        mask=draw(st.sampled_from(["any", "full", "causal", "window", "documents", "prefix"])),
        dtype=draw(st.sampled_from(list(BOUNDS))),
        tiles=Tiles(
            block_q=draw(st.sampled_from([16, 32])),
            block_k=draw(st.sampled_from([16, 32])),
            warps=4,
            stages=1,
            descriptors=draw(st.booleans()),
            split=draw(st.booleans()),
        ),
        ordered=draw(st.booleans()),
        dropout=draw(st.sampled_from([None, None, Dropout(0.3, seed=2**40 + 5, head=3)])),
        seed=draw(st.integers(0, 9)),
    )


def _mask(case: Case) -> BlockMask:
    """The mask over all keys; ``any`` has random ranges, falling and empty ones among them."""
    keys, rng = case.edges[-1], np.random.default_rng(case.seed)
    length = max(keys, case.queries)
    positions, key_positions = np.arange(length - case.queries, length), np.arange(keys)
    if case.mask == "any":
        low, high = np.sort(rng.integers(0, keys + 1, (2, case.batch, case.queries)), axis=0)
        high = np.where(rng.random(low.shape) < 0.2, low, high)
        return BlockMask(low, high, positions, key_positions)
    rules = {"full": Mask(), "window": Mask(left=9, right=1), "prefix": Mask(right=0, prefix=7)}
    documents = (
        rng.integers(0, 2, (case.batch, length)).cumsum(1) // 9 if case.mask in ("documents", "prefix") else None
    )
    ranges = rules.get(case.mask, CAUSAL).ranges(positions, length, documents)
    return BlockMask.of(ranges, positions, key_positions)


def _columns(mask: BlockMask, start: int, stop: int) -> BlockMask:
    low, high = (bound.clip(start, stop) - start for bound in (mask.start, mask.stop))
    return BlockMask(low, high, mask.query_positions, mask.key_positions[start:stop])


class Guarded:
    """fp32 tensors with a margin of poison around each: the interpreter does not see writes out of bounds."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []

    def make(self, *shape: int, fill: float = 0.0) -> Tensor:
        count = math.prod(shape)
        buffer = torch.full((count + 128,), POISON)
        self._buffers.append(buffer)
        return buffer[64 : 64 + count].view(shape).fill_(fill)

    @property
    def intact(self) -> bool:
        return all((b[:64] == POISON).all() and (b[-64:] == POISON).all() for b in self._buffers)


def _close(ours: Tensor, exact: Tensor, bound: float) -> None:
    assert torch.isfinite(ours).all()
    assert (ours.double() - exact).norm() <= bound * exact.norm() + 1e-5 * math.sqrt(exact.numel())


def _inputs(case: Case) -> list[Tensor]:
    """q, k, v and the output's gradient; half of the cases have heads before rows in memory."""
    generator = torch.Generator().manual_seed(case.seed)
    heads, keys = case.kv_heads * case.group, case.edges[-1]
    shapes = [(case.queries, heads, case.width), (keys, case.kv_heads, case.width)]
    shapes += [(keys, case.kv_heads, case.value_width), (case.queries, heads, case.value_width)]
    tensors = [torch.randn(case.batch, *shape, generator=generator).to(case.dtype) for shape in shapes]
    return [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors] if case.seed % 2 else tensors


PLAIN = Case(
    batch=2, kv_heads=1, group=2, width=16, value_width=24, queries=40, edges=(0, 50), order=(0,), mask="causal",
    dtype=torch.float32, tiles=Tiles(32, 32, 4, 1), ordered=False, dropout=None, seed=0,
)  # fmt: skip


@example(replace(PLAIN, batch=1, mask="any", dropout=Dropout(0.3, seed=5, head=3)))
@example(replace(PLAIN, batch=1, tiles=Tiles(16, 16, 4, 1, split=True), ordered=True))
@settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_blocks_in_any_order_add_up_to_the_reference(case: Case) -> None:
    q, k, v, d_out = _inputs(case)
    mask, guarded, (bound, lse_bound) = _mask(case), Guarded(), BOUNDS[case.dtype]
    wide = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = reference.forward(wide[0], wide[1], wide[2], mask, SCALE, case.dropout)
    exact_delta = (d_out.double() * exact_out).sum(-1)
    gradients = reference.backward(
        wide[0], wide[1], wide[2], d_out.double(), exact_lse, exact_delta, mask, SCALE, case.dropout
    )

    def block(index: int) -> tuple[slice, Block]:
        keys = slice(case.edges[index], case.edges[index + 1])
        return keys, Block(q, k[:, keys], v[:, keys], _columns(mask, keys.start, keys.stop), SCALE, case.dropout)

    out = guarded.make(*q.shape[:3], case.value_width)
    lse = guarded.make(*q.shape[:3], fill=-torch.inf)
    for index in case.order:
        triton_block.forward(block(index)[1], (out, lse), case.tiles)
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert (out[empty] == 0).all()
    assert ((lse - exact_lse)[~empty].abs() < lse_bound).all()
    _close(out, exact_out, bound)

    totals = [guarded.make(*x.shape) for x in (q, k, v)]
    upstream = Upstream(d_out, lse, (out * d_out.float()).sum(-1))
    torch.use_deterministic_algorithms(case.ordered)
    try:
        for index in case.order:
            keys, part = block(index)
            triton_block.backward(part, upstream, totals[0], (totals[1][:, keys], totals[2][:, keys]), case.tiles)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, exact in zip(totals, gradients, strict=True):
        _close(ours, exact, bound)
    assert guarded.intact


@pytest.mark.parametrize("ordered", [False, True])
def test_fresh_results_equal_those_added_to_nothing(ordered: bool) -> None:
    q, k, v, d_out = _inputs(PLAIN)
    block = Block(q, k, v, _mask(PLAIN), SCALE)
    out, lse = triton_block.forward(block, config=PLAIN.tiles)
    into = (torch.zeros_like(out), torch.full_like(lse, -torch.inf))
    assert all(
        torch.equal(a, b) for a, b in zip((out, lse), triton_block.forward(block, into, PLAIN.tiles), strict=True)
    )
    upstream = Upstream(d_out, lse, (out * d_out).sum(-1))
    torch.use_deterministic_algorithms(ordered)
    try:
        fresh = triton_block.backward(block, upstream, config=PLAIN.tiles)
        zeros = [torch.zeros_like(x) for x in (q, k, v)]
        added = triton_block.backward(block, upstream, zeros[0], (zeros[1], zeros[2]), PLAIN.tiles)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(fresh, added, strict=True))


def test_a_block_without_keys_or_queries_changes_nothing() -> None:
    q, k, v, d_out = _inputs(PLAIN)
    nothing = np.zeros((1, 40), dtype=np.int64)
    no_keys = Block(q, k[:, :0], v[:, :0], BlockMask(nothing, nothing, np.arange(40), np.arange(0)), SCALE)
    out, lse = triton_block.forward(no_keys)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()
    gradients = triton_block.backward(no_keys, Upstream(d_out, lse, lse))
    assert [x.shape for x in gradients] == [q.shape, k[:, :0].shape, v[:, :0].shape]
    assert (gradients[0] == 0).all()
    unseen = Block(q, k, v, BlockMask(nothing, nothing, np.arange(40), np.arange(50)), SCALE)
    running = (torch.randn(2, 40, 2, 24), torch.randn(2, 40, 2))
    wanted = [x.clone() for x in running]
    for ours, before in zip(triton_block.forward(unseen, running, PLAIN.tiles), wanted, strict=True):
        assert torch.allclose(ours, before, rtol=1e-6, atol=1e-7)


def test_rounding_is_that_of_the_inputs() -> None:
    """bf16 inputs leave the error that rounding the weights to bf16 must leave: less, and the repair does nothing."""
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v, _ = (x.to(torch.bfloat16).to(dtype) for x in _inputs(PLAIN))
        out, _ = triton_block.forward(Block(q, k, v, _mask(PLAIN), SCALE), config=PLAIN.tiles)
        exact, _ = reference.forward(q.double(), k.double(), v.double(), _mask(PLAIN), SCALE)
        errors.append(((out - exact).norm() / exact.norm()).item())
    assert errors[0] < 2e-6
    assert 3e-4 < errors[1] < 3.5e-3


@pytest.mark.parametrize("count", [1, 3])
def test_partials_merge_at_once(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    shape = (2, 11, 3, 24)
    outs = [torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(count)]
    lses = [4 * torch.randn(shape[:3], generator=generator) for _ in range(count)]
    running = torch.randn(shape, generator=generator), torch.randn(shape[:3], generator=generator)
    for lse in (*lses, running[1]):
        lse[torch.rand(shape[:3], generator=generator) < 0.4] = -torch.inf
    running[1][0, 0], lses[0][0, 0] = -torch.inf, -torch.inf
    everything = torch.stack([running[1], *lses]).double()
    total = torch.logsumexp(everything, 0)
    weights = (everything - total.masked_fill(total == -torch.inf, 0.0)).exp()
    exact = (weights.unsqueeze(-1) * torch.stack([running[0], *outs]).double()).sum(0)
    guarded = Guarded()
    out, lse = guarded.make(*shape), guarded.make(*shape[:3])
    out.copy_(running[0])
    lse.copy_(running[1])
    triton_merge.merge_(out, lse, list(zip(outs, lses, strict=True)))
    seen = total > -torch.inf
    assert torch.equal(lse == -torch.inf, ~seen)
    assert torch.allclose(lse[seen].double(), total[seen], atol=4e-6)
    _close(out[seen], exact[seen], 2e-6)
    assert guarded.intact


@pytest.mark.parametrize("library", [Flash3(fake_flash.flash3()), Flash4(fake_flash.flash4())])
def test_a_flash_block_merges_into_the_running_state(monkeypatch: pytest.MonkeyPatch, library: Flash) -> None:
    q, k, v, d_out = (x.to(torch.bfloat16) for x in _inputs(replace(PLAIN, value_width=PLAIN.width)))
    rows, keys = np.arange(10, 50), np.arange(50)
    whole = BlockMask.of(CAUSAL.ranges(rows, 50), rows, keys)
    monkeypatch.setattr("fused.gpu.flash.find", lambda *_: (library, True))
    wide = [x.double() for x in (q, k, v)]
    exact_out, exact_lse = reference.forward(wide[0], wide[1], wide[2], whole, SCALE)
    first = Block(q, k[:, :10], v[:, :10], _columns(whole, 0, 10), SCALE)
    out, lse = triton_block.forward(first, config=PLAIN.tiles)
    gpu.forward(q, k[:, 10:], v[:, 10:], _columns(whole, 10, 50), SCALE, (out, lse), None)
    _close(out, exact_out, 4e-3)
    assert torch.allclose(lse.double(), exact_lse, atol=4e-6)
    delta = (out * d_out.float()).sum(-1)
    dq, dk, dv = gpu.backward(q, k, v, d_out, lse, delta, whole, SCALE, None, None, None)
    exact = reference.backward(wide[0], wide[1], wide[2], d_out.double(), exact_lse, delta.double(), whole, SCALE)
    for ours, truth in zip((dq, dk, dv), exact, strict=True):
        assert ours.dtype == torch.float32
        _close(ours, truth, 6e-3)

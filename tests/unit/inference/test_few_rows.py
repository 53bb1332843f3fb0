"""Compiled loops for few rows do what torch's operators do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from inference import few_rows
from inference.model_runner import _rotate
from inference.paged_attention import SpanAttention

SIZES = [(1, 3, 3, 64), (5, 1, 1, 2), (16, 2, 4, 10)]  # rows, kv_heads, group, head_dim


def dense(queries: Tensor, store: Tensor, runs: list[tuple[int, int]]) -> Tensor:
    """One row by torch's attention: ``queries`` [1, kv_heads, group, D]."""
    kv_heads = queries.shape[1]
    past = [[(store[:kv_heads, start:end], store[kv_heads:, start:end])] for start, end in runs]
    return SpanAttention(past, 1, None, torch.float32)(0, queries, queries[:, :, 0], queries[:, :, 0])


@pytest.mark.parametrize("sizes", SIZES)
def test_rows_attend_to_their_own_slots_and_leave_others_alone(sizes: tuple[int, int, int, int]):
    rows, kv_heads, group, width = sizes
    torch.manual_seed(rows)
    queries = 3 * torch.randn(rows, kv_heads, group, width)
    store = torch.randn(2 * kv_heads, 200, width)
    runs = {row: [(row, row + 1 + 7 * row), (150, 151 + row)][: 1 + row % 2] for row in range(0, rows, 2)}
    out = torch.full((rows, kv_heads * group * width), 7.0)
    reaches = [(row, start, end) for row in reversed(runs) for start, end in runs[row]]
    few_rows.Reaches(reaches).attend(queries, store.numpy(), out)
    for row in range(rows):
        if row in runs:
            torch.testing.assert_close(out[row : row + 1], dense(queries[row : row + 1], store, runs[row]))
        else:
            assert bool((out[row] == 7.0).all())


def test_logits_far_apart_do_not_overflow():
    queries, store = torch.full((1, 1, 1, 4), 1e4), torch.ones(2, 3, 4)
    store[0, 1] = -1.0
    store[1, 2] = 3.0
    out = torch.empty(1, 4)
    few_rows.Reaches([(0, 0, 3)]).attend(queries, store.numpy(), out)
    torch.testing.assert_close(out, torch.full((1, 4), 2.0))


@pytest.mark.parametrize("sizes", SIZES)
def test_heads_are_turned_and_kept(sizes: tuple[int, int, int, int]):
    rows, kv_heads, group, width = sizes
    torch.manual_seed(rows)
    qkv = torch.randn(rows, kv_heads * (group + 2), width)
    turn = torch.polar(torch.ones(rows, 1, width // 2), torch.randn(rows, 1, width // 2))
    slots, store = torch.randperm(30)[:rows], torch.zeros(2 * kv_heads, 30, width)
    expected, kept = qkv.clone(), store.clone()
    _rotate(expected[:, : kv_heads * (group + 1)], turn)
    kept.index_copy_(1, slots, expected[:, kv_heads * group :].transpose(0, 1))
    found = qkv.clone(), store.clone()
    few_rows.turn_and_keep(found[0], turn.numpy(), found[1].numpy(), slots.numpy())
    torch.testing.assert_close(found, (expected, kept))
    reaches = few_rows.Reaches([(row, 0, 30 - row) for row in range(rows)])
    out = reaches.turn_keep_attend(qkv, turn.numpy(), store.numpy(), slots.numpy())
    torch.testing.assert_close((qkv, store), (expected, kept))
    queries = expected[:, : kv_heads * group].unflatten(1, (kv_heads, group))
    for row in range(rows):
        torch.testing.assert_close(out[row : row + 1], dense(queries[row : row + 1], kept, [(0, 30 - row)]))


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_norms_and_gates(rows: int):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 30), torch.randn(30)
    found = few_rows.norm(x, weight.numpy(), np.float32(1e-5))
    torch.testing.assert_close(found, F.rms_norm(x, (30,), weight, 1e-5))
    more = torch.randn(rows, 30)
    total, found = few_rows.add_and_norm(x, more, weight.numpy(), np.float32(1e-5))
    torch.testing.assert_close((total, found), (x + more, F.rms_norm(x + more, (30,), weight, 1e-5)))
    both = 30 * torch.randn(rows, 14)
    both[0, :2] = torch.tensor([200.0, -200.0])  # beyond what exp can hold
    gate, up = both.chunk(2, 1)
    torch.testing.assert_close(few_rows.gated(both), F.silu(gate) * up)

"""Layouts: which rank holds which tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError
from fused.mask import CAUSAL
from parallel.layout import LAYOUTS, Layout, Run, balanced, contiguous, named_layout, zigzag

_sizes = st.tuples(st.integers(0, 40), st.integers(1, 8), st.sampled_from(tuple(LAYOUTS)))


@given(_sizes)
def test_positions_of_all_ranks_are_the_whole_sequence_once(size: tuple[int, int, str]) -> None:
    seq_len, ranks, name = size
    layout = named_layout(name, seq_len, ranks)
    held = [layout.positions(rank) for rank in range(ranks)]
    assert all((np.diff(p) > 0).all() for p in held)
    assert tuple(len(p) for p in held) == layout.lengths
    assert max(layout.lengths) - min(layout.lengths) <= 2
    assert np.array_equal(np.sort(np.concatenate(held)), np.arange(seq_len))


@given(_sizes, st.sampled_from([0, 1, 2, -1]), st.integers(0, 5))
def test_shard_takes_the_positions_and_unshard_puts_them_back(
    size: tuple[int, int, str], dim: int, offset: int
) -> None:
    seq_len, ranks, name = size
    layout = named_layout(name, seq_len, ranks).shifted(offset)
    x = torch.arange(2 * 3 * seq_len).reshape(2, 3, seq_len).movedim(2, dim)
    parts = [layout.shard(x, dim, rank) for rank in range(ranks)]
    for rank, part in enumerate(parts):
        assert part.is_contiguous()
        wanted = torch.from_numpy(layout.positions(rank) - (offset if seq_len else 0))
        assert torch.equal(part, x.index_select(dim, wanted))
    assert torch.equal(layout.unshard(parts, dim), x)


def test_zigzag_pairs_an_early_part_with_a_late_one() -> None:
    layout = zigzag(12, 3)
    assert layout.positions(0).tolist() == [0, 1, 10, 11]
    assert layout.positions(2).tolist() == [4, 5, 6, 7]
    assert layout.ranks[2] == (Run(4, 8),)


def test_any_cuts_make_a_layout() -> None:
    layout = Layout.of([[(4, 4), (6, 9)], [], [(0, 2), (2, 6)]])
    assert layout.ranks == ((Run(6, 9),), (), (Run(0, 6),))
    assert layout.lengths == (3, 0, 6)
    assert layout.bounds == Run(0, 9)


def test_balanced_cuts_share_the_work_of_the_mask() -> None:
    ids = torch.zeros(1, 4000, dtype=torch.int64)
    layout = balanced(ids, 4)
    start, stop = CAUSAL.ranges(np.arange(4000), 4000)
    work = [(stop - start)[0, layout.positions(rank)].sum() for rank in range(4)]
    assert max(work) <= 1.01 * np.mean(work)
    tokens = balanced(ids, 4, token_cost=1e9).lengths
    assert max(tokens) - min(tokens) <= 2
    assert contiguous(4000, 4).lengths == (1000,) * 4


def test_an_unknown_layout_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean zigzag"):
        named_layout("zig-zag", 8, 2)

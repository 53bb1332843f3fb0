"""Layouts: which rank holds which tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conf.errors import ConfigError
from parallel.layout import LAYOUTS, positions, shard, unshard

_sizes = st.tuples(st.integers(1, 8), st.integers(1, 5), st.sampled_from(LAYOUTS))


@given(_sizes)
def test_positions_of_all_ranks_are_the_whole_sequence_once(size: tuple[int, int, str]) -> None:
    world_size, chunk, layout = size
    seq_len = chunk * world_size * 2
    held = [positions(seq_len, world_size, rank, layout) for rank in range(world_size)]
    assert all((p.diff() > 0).all() and len(p) == seq_len // world_size for p in held)
    assert torch.equal(torch.cat(list(held)).sort().values, torch.arange(seq_len))


@given(_sizes, st.sampled_from([0, 1, 2, -1]))
def test_shard_takes_the_positions_and_unshard_puts_them_back(size: tuple[int, int, str], dim: int) -> None:
    world_size, chunk, layout = size
    seq_len = chunk * world_size * 2
    x = torch.arange(2 * 3 * seq_len).reshape(2, 3, seq_len).movedim(2, dim)
    parts = [shard(x, dim, world_size, rank, layout) for rank in range(world_size)]
    for rank, part in enumerate(parts):
        assert part.is_contiguous()
        assert torch.equal(part, x.index_select(dim, positions(seq_len, world_size, rank, layout)))
    assert torch.equal(unshard(parts, dim, layout), x)


def test_zigzag_pairs_an_early_chunk_with_a_late_one() -> None:
    assert positions(12, 3, 0, "zigzag").tolist() == [0, 1, 10, 11]
    assert positions(12, 3, 2, "zigzag").tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(("seq_len", "layout", "wanted"), [(10, "contiguous", "4"), (12, "zigzag", "8")])
def test_a_length_that_cannot_be_cut_evenly_is_refused(seq_len: int, layout: str, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"a multiple of {wanted}"):
        positions(seq_len, 4, 0, layout)


def test_an_unknown_layout_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean zigzag"):
        positions(8, 2, 0, "zig-zag")

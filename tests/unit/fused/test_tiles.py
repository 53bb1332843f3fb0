"""Tiles cover exactly what the dense mask shows, each pair once, and never hold a fully masked row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fused.mask import BlockMask
from fused.tiles import IntArray, staircase


@st.composite
def _positions(draw: st.DrawFn) -> IntArray:
    """Up to three runs of consecutive positions, as shards of any layout have them; now and then with a stride."""
    stride = draw(st.sampled_from([1, 1, 1, 2]))
    pieces: list[int] = []
    start = 0
    for _ in range(draw(st.integers(1, 3))):
        start += draw(st.integers(0, 9))
        count = draw(st.integers(0 if pieces else 1, 9))
        pieces += range(start, start + count * stride, stride)
        start = pieces[-1] + 1
    return np.array(pieces, dtype=np.int64)


@st.composite
def _masks(draw: st.DrawFn) -> BlockMask:
    queries, keys = draw(_positions()), draw(_positions())
    causal, documents = draw(st.booleans()), draw(st.booleans())
    if not documents:
        return BlockMask(queries, keys, causal)
    batch = draw(st.integers(1, 3))
    ids = st.lists(st.integers(-1, 2), min_size=40, max_size=40)
    rows = np.array([draw(ids) for _ in range(batch)], dtype=np.int64)
    if draw(st.booleans()):
        rows = np.sort(rows, axis=1)  # packed documents, each in one run; else ids come back later
    longest = max(int(queries[-1]), int(keys[-1])) + 1
    whole = np.repeat(rows, -(-longest // 40) if draw(st.booleans()) else 3, axis=1)
    whole = np.pad(whole, ((0, 0), (0, max(0, longest - whole.shape[1]))), constant_values=-1)
    return BlockMask(queries, keys, causal, whole[:, queries], whole[:, keys])


@settings(max_examples=400, deadline=None)
@given(_masks())
def test_tiles_are_the_dense_mask(mask: BlockMask) -> None:
    dense = mask.dense()[:, 0].numpy()
    covered = np.zeros(dense.shape, dtype=np.int64)
    for tile in mask.tiles:
        rows, columns = tile.q1 - tile.q0, tile.k1 - tile.k0
        assert rows > 0
        assert columns > 0
        assert not tile.causal or rows == columns
        shape = np.tril(np.ones((rows, columns), dtype=np.int64)) if tile.causal else 1
        last = len(covered) if tile.b1 == -1 else tile.b1
        covered[tile.b0 : last, tile.q0 : tile.q1, tile.k0 : tile.k1] += shape
    assert np.array_equal(covered, dense.astype(np.int64))


def test_the_common_blocks_are_one_tile() -> None:
    zigzag = np.concatenate([np.arange(4), np.arange(12, 16)])  # rank 0 of two ranks with chunks of 4
    other = np.arange(4, 12)
    assert staircase(zigzag, zigzag) == [(0, 8, 0, 8, True)]
    assert staircase(other, other) == [(0, 8, 0, 8, True)]
    assert staircase(other, zigzag) == [(0, 8, 0, 4, False)]
    assert staircase(zigzag, other) == [(4, 8, 0, 8, False)]
    assert staircase(zigzag[:4], other) == []

"""Tiles cover exactly what the dense mask shows, each pair once, and never hold a fully masked row."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fused.mask import CAUSAL, FULL, BlockMask, Mask
from fused.tiles import IntArray
from tests.helpers.masks import dense_mask


@st.composite
def _positions(draw: st.DrawFn) -> IntArray:
    """Up to three runs of consecutive positions, as shards of any layout have them; now and then with a stride."""
    stride = draw(st.sampled_from([1, 1, 1, 2]))
    longest = draw(st.sampled_from([9, 9, 300]))
    pieces: list[int] = []
    start = 0
    for _ in range(draw(st.integers(1, 3))):
        start += draw(st.integers(0, 9))
        count = draw(st.integers(0 if pieces else 1, longest))
        pieces += range(start, start + count * stride, stride)
        start = pieces[-1] + 1
    return np.array(pieces, dtype=np.int64)


_limits = st.sampled_from([None, None, 0, 1, 3, 40, 200])
_rules = st.builds(Mask, left=_limits, right=_limits, prefix=st.sampled_from([0, 0, 1, 7]))


@st.composite
def _masks(draw: st.DrawFn) -> tuple[BlockMask, np.ndarray]:
    queries, keys = draw(_positions()), draw(_positions())
    rule, length = draw(_rules), int(max(queries[-1], keys[-1])) + 1
    documents = None
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.02, 0.1, 0.5, 1.0]))  # 1: documents of one token
        rng = np.random.default_rng(draw(st.integers(0, 2**32)))
        documents = (rng.random((draw(st.integers(1, 3)), length)) < share).cumsum(1) % 3 - 1
    mask = BlockMask.of(rule.ranges(queries, length, documents), queries, keys)
    return mask, dense_mask(rule, length, documents)[:, queries][:, :, keys]


@settings(max_examples=400, deadline=None)
@given(_masks())
def test_tiles_are_the_dense_mask(case: tuple[BlockMask, np.ndarray]) -> None:
    mask, exact = case
    assert np.array_equal(mask.dense()[:, 0].numpy(), exact)
    covered = np.zeros(exact.shape, dtype=np.int64)
    for tile in mask.tiles:
        rows, columns = tile.q1 - tile.q0, tile.k1 - tile.k0
        assert rows > 0
        assert columns > 0
        last = len(covered) if tile.b1 == -1 else tile.b1
        area = slice(tile.b0, last), slice(tile.q0, tile.q1), slice(tile.k0, tile.k1)
        shape = np.ones((last - tile.b0, rows, columns), dtype=np.int64)
        if tile.kind == "causal":
            assert rows == columns
            shape = np.tril(shape)
        if tile.kind == "masked":
            shape = exact[area].astype(np.int64)
        assert (shape.sum(-1) > 0).all()
        covered[area] += shape
    assert np.array_equal(covered, exact.astype(np.int64))


def _tiles(rule: Mask, queries: IntArray, keys: IntArray) -> list[tuple[int, int, int, int, str]]:
    length = int(max(queries[-1], keys[-1])) + 1
    return [tile[2:] for tile in BlockMask.of(rule.ranges(queries, length), queries, keys).tiles]


def test_the_common_blocks_are_one_tile() -> None:
    zigzag = np.concatenate([np.arange(40), np.arange(120, 160)])  # rank 0 of two ranks with chunks of 40
    other = np.arange(40, 120)
    assert _tiles(CAUSAL, zigzag, zigzag) == [(0, 80, 0, 80, "causal")]
    assert _tiles(CAUSAL, other, other) == [(0, 80, 0, 80, "causal")]
    assert _tiles(CAUSAL, other, zigzag) == [(0, 80, 0, 40, "full")]
    assert _tiles(CAUSAL, zigzag, other) == [(40, 80, 0, 80, "full")]
    assert _tiles(CAUSAL, zigzag[:40], other) == []
    assert _tiles(FULL, zigzag, other) == [(0, 80, 0, 80, "full")]


def test_a_wide_window_is_masked_only_along_its_lower_edge() -> None:
    tiles = BlockMask.of(Mask(left=2000, right=0).ranges(np.arange(4000), 4000), np.arange(4000), np.arange(4000)).tiles
    areas = dict.fromkeys(("full", "causal", "masked"), 0)
    for tile in tiles:
        areas[tile.kind] += (tile.q1 - tile.q0) * (tile.k1 - tile.k0)
    assert areas["masked"] <= 2000 * 129
    assert len(tiles) < 60


def test_short_documents_share_a_tile() -> None:
    documents = np.arange(1024)[None] // 5
    mask = BlockMask.of(CAUSAL.ranges(np.arange(1024), 1024, documents), np.arange(1024), np.arange(1024))
    assert len(mask.tiles) <= 10

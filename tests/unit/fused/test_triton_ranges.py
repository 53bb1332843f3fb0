"""What the backward kernel is told of a mask, against the mask itself."""

import numpy as np
import pytest

from fused.mask import CAUSAL, Mask
from fused.triton_ranges import query_ranges


def _random_ranges(rng: np.random.Generator, rows: int, keys: int) -> tuple[np.ndarray, np.ndarray]:
    kind = rng.integers(3)
    if kind == 0:
        start, stop = np.sort(rng.integers(0, keys + 1, (2, 2, rows)), axis=0)
        return start, stop
    rule = CAUSAL if kind == 1 else Mask(left=int(rng.integers(0, 20)), right=int(rng.integers(0, 5)))
    return rule.ranges(np.arange(rows), keys)


@pytest.mark.parametrize("seed", range(60))
def test_ranges_cover_what_is_seen_and_whole_tiles_are_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, keys = (int(x) for x in rng.integers(1, 70, 2))
    block_q, block_k = (int(x) for x in rng.choice([4, 8, 16], 2))
    start, stop = (x.clip(0, keys) for x in _random_ranges(rng, rows, keys))
    key = np.arange(keys)
    visible = (start[..., None] <= key) & (key < stop[..., None])
    for batch, tiles in enumerate(query_ranges(start, stop, keys, block_q, block_k)):
        for index, (first, full, ragged, last) in enumerate(tiles):
            tile = visible[batch, :, index * block_k : (index + 1) * block_k]
            assert first <= full <= ragged <= last
            assert all(edge % block_q == 0 for edge in (first, full, ragged, last))
            assert not tile[:first].any()
            assert not tile[last:].any()
            if full < ragged:
                assert tile.shape[1] == block_k
                assert ragged <= rows
                assert tile[full:ragged].all()


def test_causal_ranges_are_tight() -> None:
    ranges = query_ranges(*CAUSAL.ranges(np.arange(64), 64), 64, 16, 16)
    assert ranges[0].tolist() == [[16 * i, 16 * i + 16, 64, 64] if i < 3 else [48, 48, 48, 64] for i in range(4)]

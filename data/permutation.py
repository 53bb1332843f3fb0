"""A stateless pseudo-random permutation of 0..n-1: any element in O(1) memory, any number of them at once.

A 4-round Feistel network permutes the next power of four; values outside the range are permuted again until they fall
inside (cycle walking), which keeps it a bijection of the range.
"""

import numpy as np
import numpy.typing as npt

ROUNDS = 4
Ints = npt.NDArray[np.int64]


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of splitmix64: every input bit changes about half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: npt.ArrayLike, n: int, *key: int) -> Ints:
    """Images of ``index`` (any shape, values in 0..n-1) under the permutation of 0..n-1 that ``key`` names."""
    values = np.atleast_1d(np.asarray(index, dtype=np.int64)).astype(np.uint64)
    if n < 1 or (values.size and int(values.max()) >= n):
        raise ValueError(f"index must lie in 0..{n - 1}")
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    seed = np.zeros(1, dtype=np.uint64)
    for part in key:
        seed = mix(seed + np.uint64(0x9E3779B97F4A7C15) + np.uint64(part % 2**64))
    keys = [mix(seed + np.uint64((r + 1) * 0x9E3779B97F4A7C15 % 2**64)) for r in range(ROUNDS)]
    out, pending = values.reshape(-1).copy(), np.arange(values.size)
    while pending.size:
        out[pending] = _feistel(out[pending], keys, half)
        pending = pending[out[pending] >= n]
    return out.astype(np.int64).reshape(np.shape(index))


def _feistel(x: npt.NDArray[np.uint64], keys: list[npt.NDArray[np.uint64]], half: int) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (mix(right + key) & mask)
    return (left << shift) | right


def in_epochs(positions: Ints, size: int, seed: int) -> Ints:
    """Items of 0..size-1 at positions of an endless stream that has each once an epoch, every epoch shuffled anew."""
    epochs, within = np.divmod(positions, size)
    chosen = np.empty_like(positions)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        chosen[here] = permute(within[here], size, seed, int(epoch))
    return chosen

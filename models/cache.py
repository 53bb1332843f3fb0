"""The key-value cache of one batch of sequences that have the same length."""

from bisect import bisect_left

import torch
from torch import Tensor

from models.spec import ModelSpec

BLOCK = 256  # tokens; capacities are multiples of it


class KVCache:
    """Keys (already rotated) and values of all layers, preallocated and grown by need.

    A forward pass appends to every layer and then advances ``length`` once, so a pass that fails half-way leaves
    the cache as it was. A layer may hold some of the tokens only (mixture of depths).
    """

    def __init__(
        self,
        spec: ModelSpec,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        block: int = BLOCK,
    ) -> None:
        self.length = 0  # tokens held
        self._block = block
        self._places: list[list[int] | None] = [None] * spec.layers  # of the tokens of layers that hold some only
        self._held, self._new = [0] * spec.layers, [0] * spec.layers
        shape = (batch, 0, spec.kv_heads, spec.head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.layers)]

    def held(self, layer: int) -> int:
        """Tokens of the sequence that a layer holds."""
        return self._held[layer]

    def append(
        self, layer: int, k_BSKD: Tensor, v_BSKD: Tensor, places_S: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Write the new tokens of one layer behind the old; returns all its keys and values, [B, T, K, D].

        ``places_S`` says which tokens of this pass they are, ascending; None: all of them.
        """
        start = self._held[layer]
        end = start + k_BSKD.shape[1]
        for store, new in ((self._keys, k_BSKD), (self._values, v_BSKD)):
            if end > store[layer].shape[1]:
                store[layer] = self._grown(store[layer], start, end)
            store[layer][:, start:end] = new
        self._new[layer] = end - start
        if places_S is not None:
            self._places[layer] = [*(self._places[layer] or [])[:start], *(places_S + self.length).tolist()]
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def skip(self, layer: int) -> None:
        """A layer takes none of the tokens of this pass."""
        self._new[layer] = 0
        self._places[layer] = self._places[layer] or []

    def advance(self, tokens: int) -> None:
        """Make a pass over ``tokens`` tokens, appended to every layer, part of the cache."""
        self.length += tokens
        self._held = [held + new for held, new in zip(self._held, self._new, strict=True)]

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on; the memory stays for the next ones."""
        assert 0 <= length <= self.length, f"cannot truncate {self.length} tokens to {length}"
        for layer, places in enumerate(self._places):
            self._held[layer] = length if places is None else bisect_left(places[: self._held[layer]], length)
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, over all layers."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def _grown(self, old: Tensor, held: int, needed: int) -> Tensor:
        # Half as much again, so that copying stays linear in the final length.
        capacity = max(needed, old.shape[1] * 3 // 2)
        capacity = -(-capacity // self._block) * self._block
        new = old.new_empty((old.shape[0], capacity, *old.shape[2:]))
        new[:, :held] = old[:, :held]
        return new

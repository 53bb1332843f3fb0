"""The key-value cache of one batch of sequences that have the same length."""

import torch
from torch import Tensor

from models.spec import ModelSpec

BLOCK = 256  # tokens; capacities are multiples of it


class KVCache:
    """Keys (already rotated) and values of all layers, preallocated and grown by need.

    A forward pass appends to every layer and then advances ``length`` once, so a pass that fails half-way leaves
    the cache as it was.
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
        shape = (batch, 0, spec.kv_heads, spec.head_dim)
        self._keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.layers)]
        self._values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(spec.layers)]

    def append(self, layer: int, k_BSKD: Tensor, v_BSKD: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens of one layer behind ``length``; returns all its keys and values, [B, T, K, D]."""
        end = self.length + k_BSKD.shape[1]
        for store, new in ((self._keys, k_BSKD), (self._values, v_BSKD)):
            if end > store[layer].shape[1]:
                store[layer] = self._grown(store[layer], end)
            store[layer][:, self.length : end] = new
        return self._keys[layer][:, :end], self._values[layer][:, :end]

    def advance(self, tokens: int) -> None:
        """Make the last ``tokens`` appended to every layer part of the cache."""
        self.length += tokens

    def truncate(self, length: int) -> None:
        """Forget all tokens from ``length`` on; the memory stays for the next ones."""
        assert 0 <= length <= self.length, f"cannot truncate {self.length} tokens to {length}"
        self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes allocated, over all layers."""
        return sum(t.numel() * t.element_size() for t in (*self._keys, *self._values))

    def _grown(self, old: Tensor, needed: int) -> Tensor:
        # Half as much again, so that copying stays linear in the final length.
        capacity = max(needed, old.shape[1] * 3 // 2)
        capacity = -(-capacity // self._block) * self._block
        new = old.new_empty((old.shape[0], capacity, *old.shape[2:]))
        new[:, : self.length] = old[:, : self.length]
        return new

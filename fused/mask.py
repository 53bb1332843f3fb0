"""What one block of queries may see of one block of keys."""

from dataclasses import dataclass
from functools import cached_property

import torch

from fused.tiles import IntArray, Tile, block_tiles


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Positions and document ids of a block's queries and keys; kernels read from it the form that they need.

    ``query_positions [Sq]`` and ``key_positions [Sk]`` are absolute and ascend. With ``causal`` a query sees the keys
    at or before its own position. With documents (``[batch, Sq]``, ``[batch, Sk]``) it sees only keys of its own id;
    every id counts, so padding (-1) sees padding and no row of a self-attention is ever empty.
    """

    query_positions: IntArray
    key_positions: IntArray
    causal: bool
    query_documents: IntArray | None = None
    key_documents: IntArray | None = None

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The visible part as rectangles and triangles, cut once and kept."""
        return block_tiles(
            self.query_positions, self.key_positions, self.causal, self.query_documents, self.key_documents
        )

    def dense(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The mask as booleans ``[batch or 1, 1, Sq, Sk]``, True where a query sees a key."""
        queries = torch.from_numpy(self.query_positions).to(device)
        keys = torch.from_numpy(self.key_positions).to(device)
        visible = torch.ones(1, 1, len(queries), len(keys), dtype=torch.bool, device=device)
        if self.causal:
            visible = visible & (keys[None, :] <= queries[:, None])
        if self.query_documents is not None and self.key_documents is not None:
            query_ids = torch.from_numpy(self.query_documents).to(device)
            key_ids = torch.from_numpy(self.key_documents).to(device)
            visible = visible & (query_ids[:, None, :, None] == key_ids[:, None, None, :])
        return visible

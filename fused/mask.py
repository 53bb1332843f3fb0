"""What queries may see of keys: for each query one contiguous range of keys, whatever the mask.

Full, causal and sliding-window attention, packed documents and prefix language models, and any of them together, all
have this form, so the kernels need two integers a query and nothing else. Torch is imported where a device needs
the mask: plans are made without it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from fused.tiles import IntArray, Tile, interval_tiles

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Ranges = tuple[IntArray, IntArray]  # first visible key and the one after the last, [batch or 1, queries] each


def document_bounds(documents: IntArray) -> Ranges:
    """Where the document of each token starts and stops, ``[batch, S]`` each.

    A document is a run of equal ids; negative ids (padding) are no exception, so padding sees padding and no row of a
    self-attention is ever empty.
    """
    batch, length = documents.shape
    index = np.arange(length)
    edge = np.ones((batch, length + 1), dtype=bool)
    edge[:, 1:-1] = documents[:, 1:] != documents[:, :-1]
    start = np.maximum.accumulate(np.where(edge[:, :-1], index, 0), axis=1)
    stop = np.minimum.accumulate(np.where(edge[:, 1:], index + 1, length)[:, ::-1], axis=1)[:, ::-1]
    return start, stop


@dataclass(frozen=True)
class Mask:
    """A query at position ``p`` sees the keys ``p - left`` to ``p + right`` of its own document.

    ``None`` sets no limit on that side. The first ``prefix`` tokens of every document see each other in both
    directions, whatever ``right`` is (prefix language models).
    """

    left: int | None = None
    right: int | None = None
    prefix: int = 0

    def ranges(self, queries: IntArray, keys: int, documents: IntArray | None = None) -> Ranges:
        """The visible ranges of queries at the absolute positions ``queries [Sq]`` over keys at ``[0, keys)``.

        With ``documents [batch, keys]`` every query position is below ``keys``. Neither end of the range falls from
        one query to the next.
        """
        first, last = np.zeros((1, len(queries)), dtype=np.int64), np.full((1, len(queries)), keys)
        if documents is not None:
            first, last = (bound[:, queries] for bound in document_bounds(documents))
        stop = last
        if self.right is not None:
            stop = np.minimum(last, np.maximum(queries + self.right + 1, first + self.prefix))
        start = first if self.left is None else np.maximum(first, queries - self.left)
        stop = np.maximum(stop, first)
        return np.minimum(start, stop), stop


FULL = Mask()
CAUSAL = Mask(right=0)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """What a block of queries sees of a block of keys: query ``i`` sees the keys ``[start[:, i], stop[:, i])``.

    ``start`` and ``stop`` are ``[batch or 1, Sq]`` and count keys in the block's own order, in which positions ascend;
    equal ends are a query that sees nothing. ``query_positions [Sq]`` and ``key_positions [Sk]`` are absolute.
    """

    start: IntArray
    stop: IntArray
    query_positions: IntArray
    key_positions: IntArray
    _bounds: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, ranges: Ranges, query_positions: IntArray, key_positions: IntArray) -> BlockMask:
        """From ranges over absolute key positions, ``[batch or 1, Sq]``, to ranges over the keys of the block."""
        start, stop = (np.searchsorted(key_positions, bound) for bound in ranges)
        return cls(start, stop, query_positions, key_positions)

    @property
    def keys(self) -> int:
        return len(self.key_positions)

    @cached_property
    def tiles(self) -> tuple[Tile, ...]:
        """The visible part as tiles for a kernel that knows no ranges, cut once and kept."""
        return interval_tiles(self.start, self.stop)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """``(start, stop)`` as int32 tensors ``[batch or 1, Sq]`` on a device, made once for each."""
        import torch

        if device not in self._bounds:
            start, stop = (torch.from_numpy(x.astype(np.int32)).to(device) for x in (self.start, self.stop))
            self._bounds[device] = (start, stop)
        return self._bounds[device]

    def dense(self, device: torch.device | str = "cpu") -> Tensor:
        """The mask as booleans ``[batch or 1, 1, Sq, Sk]``, True where a query sees a key."""
        import torch

        start, stop = (x[:, None, :, None] for x in self.bounds(torch.device(device)))
        key = torch.arange(self.keys, device=device)
        return (start <= key) & (key < stop)

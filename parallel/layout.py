"""Which tokens of a sequence each rank holds.

- ``contiguous``: rank ``r`` holds the ``r``-th of ``ranks`` even parts. Simple, but under a causal mask the last rank
  has most of the work.
- ``zigzag``: of ``2 * ranks`` even parts rank ``r`` holds the parts ``r`` and ``2 * ranks - 1 - r``: an early one and a
  late one, so that every rank has the same causal work.
- ``balanced``: cuts of equal attention work, for packed documents: as few documents as possible are split.

Parts need not be equally long; a rank may even hold nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from conf.errors import ConfigError
from conf.rules import nearest
from fused.mask import CAUSAL, Mask
from fused.tiles import IntArray

if TYPE_CHECKING:
    from torch import Tensor  # only tensors need torch: plans are made without it


class Run(NamedTuple):
    """The tokens at the positions ``[start, stop)``."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """For every rank the runs of tokens that it holds, ascending, in the order in which it holds them."""

    ranks: tuple[tuple[Run, ...], ...]

    @classmethod
    def of(cls, parts: Sequence[Sequence[tuple[int, int]]]) -> Layout:
        """From ``(start, stop)`` of each rank's runs: empty ones are dropped, neighbours joined."""
        ranks: list[tuple[Run, ...]] = []
        for part in parts:
            runs: list[Run] = []
            for start, stop in sorted(part):
                if runs and runs[-1].stop == start:
                    runs[-1] = Run(runs[-1].start, stop)
                elif stop > start:
                    runs.append(Run(start, stop))
            ranks.append(tuple(runs))
        return cls(tuple(ranks))

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """How many tokens each rank holds."""
        return tuple(sum(len(run) for run in runs) for runs in self.ranks)

    @cached_property
    def bounds(self) -> Run:
        """The first position and the one after the last."""
        runs = [run for runs in self.ranks for run in runs]
        return Run(min((run.start for run in runs), default=0), max((run.stop for run in runs), default=0))

    def positions(self, rank: int) -> IntArray:
        """Absolute positions of the tokens of a rank, ascending."""
        runs = [np.arange(*run) for run in self.ranks[rank]]
        return np.concatenate(runs) if runs else np.zeros(0, dtype=np.int64)

    def shifted(self, offset: int) -> Layout:
        """The same layout of tokens that come ``offset`` positions later: new tokens behind a cached prefix."""
        return Layout(tuple(tuple(Run(a + offset, b + offset) for a, b in runs) for runs in self.ranks))

    def shard(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The part of ``x`` that ``rank`` holds when ``dim`` is the sequence; contiguous in memory."""
        import torch

        first = self.bounds.start
        parts = [x.narrow(dim, run.start - first, len(run)) for run in self.ranks[rank]]
        if not parts:
            return x.narrow(dim, 0, 0).contiguous()
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0].contiguous()

    def unshard(self, parts: Sequence[Tensor], dim: int) -> Tensor:
        """The whole sequence from what all ranks hold, in rank order; the inverse of :meth:`shard`."""
        import torch

        whole = torch.cat(list(parts), dim)
        positions = np.concatenate([self.positions(rank) for rank in range(len(self.ranks))])
        return whole.index_select(dim, torch.from_numpy(np.argsort(positions)).to(whole.device))


def _even_cuts(seq_len: int, parts: int) -> list[tuple[int, int]]:
    return list(pairwise(seq_len * part // parts for part in range(parts + 1)))


def contiguous(seq_len: int, ranks: int) -> Layout:
    """One even part for each rank."""
    return Layout.of([[cut] for cut in _even_cuts(seq_len, ranks)])


def zigzag(seq_len: int, ranks: int) -> Layout:
    """An early and a late part for each rank."""
    cuts = _even_cuts(seq_len, 2 * ranks)
    return Layout.of([[cuts[rank], cuts[-1 - rank]] for rank in range(ranks)])


def balanced(documents: Tensor, ranks: int, mask: Mask = CAUSAL, token_cost: float = 0.0) -> Layout:
    """Cut a batch of packed sequences ``[batch, seq]`` of document ids so that every rank has the same work.

    The work of a token is the number of keys that it sees, and ``token_cost`` more for what the model does besides
    attention (in units of one visible key). Only documents that lie across one of the ``ranks - 1`` cuts are split.
    """
    ids = documents.cpu().numpy()
    start, stop = mask.ranges(np.arange(ids.shape[1]), ids.shape[1], ids)
    work = np.cumsum((stop - start).sum(0) + token_cost * len(ids))
    targets = work[-1] * np.arange(1, ranks) / ranks
    cuts = [0, *(np.searchsorted(work, targets) + 1).tolist(), ids.shape[1]]
    return Layout.of([[cut] for cut in pairwise(cuts)])


LAYOUTS: dict[str, Callable[[int, int], Layout]] = {"contiguous": contiguous, "zigzag": zigzag}


def named_layout(name: str, seq_len: int, ranks: int) -> Layout:
    """The layout of that name.

    Raises:
        ConfigError: there is none; the message names the known ones and the nearest.
    """
    if name not in LAYOUTS:
        raise ConfigError("layout", name, f"one of {', '.join(LAYOUTS)}", nearest(name, tuple(LAYOUTS)))
    return LAYOUTS[name](seq_len, ranks)

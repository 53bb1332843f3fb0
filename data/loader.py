"""Batches by step: stateless, deterministic, and the same global stream for any number of data-parallel ranks.

The window at global position ``g = step * batch + row`` is a pure function of (seed, g): epoch ``g // windows`` has its
own permutation. So a run resumes, or goes on with another number of ranks, from the step number alone, and every
window is read exactly once an epoch. Held-out windows are the same for every seed.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from conf.errors import ConfigError, DataError
from data.permutation import in_epochs, permute
from data.shards import PADDING, Shards

Ints = npt.NDArray[np.int64]
IGNORE = -100  # label of a token that has nothing to predict
HELD_OUT_KEY = 0x5EED  # of the fixed permutation that picks the held-out windows


@dataclass(frozen=True)
class Batch:
    """One data-parallel rank's windows; every array but ``windows`` is int64 ``[rows, context]``."""

    tokens: Ints
    labels: Ints  # the next token of the window, or -100
    positions: Ints
    document_ids: Ints  # -1 on padding
    windows: Ints  # [rows], numbers of the windows in the shards

    def arrays(self) -> dict[str, Ints]:
        """The four ``[rows, context]`` arrays by name."""
        return {
            "tokens": self.tokens,
            "labels": self.labels,
            "positions": self.positions,
            "document_ids": self.document_ids,
        }


class Loader:
    """Training and held-out batches over packed shards.

    ``batch`` is the number of windows in one optimizer step over all ranks. ``attention`` is ``context`` (a token sees
    its whole window: one document id, labels across document borders), ``document`` (ids of the packed documents, the
    last token of a document predicts nothing) or ``segment`` (the same for runs of related documents). ``positions``
    restart where the ``mask`` does, at every ``document``, or count through the ``window``. Raises DataError when there
    are too few windows to train and to hold one out.
    """

    def __init__(
        self, shards: Shards, batch: int, seed: int, attention: str, eval_fraction: float, positions: str = "mask"
    ) -> None:
        total = len(shards)
        if total < 2:
            rule = "at least two windows are needed, one of them held out"
            raise DataError(str(shards.folder), f"{total} windows", rule, "use more text or a smaller data.context")
        self.shards, self.batch_size, self.seed, self.attention = shards, batch, seed, attention
        self.positions = positions
        self.eval_windows = min(max(1, round(total * eval_fraction)), total - 1)
        self.train_windows = total - self.eval_windows

    def batch(self, step: int, dp_rank: int, dp_size: int) -> Batch:
        """The windows of ``dp_rank`` at ``step`` (from 0): ``batch / dp_size`` rows."""
        if self.batch_size % dp_size:
            rule = f"the batch divides over {dp_size} data-parallel ranks"
            raise ConfigError("trainer.batch", self.batch_size, rule, f"use a multiple of {dp_size}")
        rows = self.batch_size // dp_size
        return self._read(self.train_order(step * self.batch_size + dp_rank * rows + np.arange(rows)))

    def eval_batch(self, index: int, size: int) -> Batch:
        """The ``index``-th batch of ``size`` held-out windows; after ``eval_windows`` of them they come again."""
        positions = (index * size + np.arange(size)) % self.eval_windows
        return self._read(permute(self.train_windows + positions, len(self.shards), HELD_OUT_KEY))

    def epoch(self, step: int) -> float:
        """Passes over the training windows that are finished before ``step``."""
        return step * self.batch_size / self.train_windows

    def train_order(self, positions: Ints) -> Ints:
        """Windows at global positions of the training stream."""
        chosen = in_epochs(positions, self.train_windows, self.seed)
        return permute(chosen, len(self.shards), HELD_OUT_KEY)

    def _read(self, windows: Ints) -> Batch:
        unit = "segment" if self.attention == "segment" else "document"
        stored, starts, spans = self.shards.spans_of(windows, unit)
        shape, context = stored.shape, stored.shape[1]
        tokens, labels = stored.astype(np.int64), np.full(shape, IGNORE, dtype=np.int64)
        labels[:, :-1] = tokens[:, 1:]
        if self.attention == "context":
            spans = np.where(spans == PADDING, PADDING, 0)
        lengths, new = np.diff(np.append(starts, stored.size)), starts % context == 0
        same = np.append(False, spans[1:] == spans[:-1]) & ~new  # goes on with the unit of the span before
        labels.reshape(-1)[starts[~same & ~new] - 1] = IGNORE
        for first, length in zip(starts[spans == PADDING], lengths[spans == PADDING], strict=True):
            labels.reshape(-1)[first : first + length] = IGNORE
        ids = np.repeat(spans, lengths).reshape(shape)
        origin = starts // context * context  # where positions begin to count
        if self.positions == "document" or (self.positions == "mask" and self.attention != "context"):
            kept = same if self.positions == "mask" else np.zeros_like(same)
            origin = np.maximum.accumulate(np.where(kept, 0, starts))
        positions = (np.arange(stored.size) - np.repeat(origin, lengths)).reshape(shape)
        return Batch(tokens, labels, positions, ids, windows)

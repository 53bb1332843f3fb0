"""The masks of an attention call's blocks, by the layout's positions and the documents of all ranks."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fused.mask import CAUSAL, FULL, BlockMask
from fused.tiles import IntArray
from parallel.layout import positions
from parallel.ring.schedule import Compute, Parts, Problem


def _narrow(x: IntArray, parts: Parts, whole: Parts) -> IntArray:
    length = x.shape[-1] // len(whole)
    return x[..., parts.start * length : parts.stop * length]


@lru_cache(maxsize=1024)
def _positions(problem: Problem, local_seq: int, rank: int) -> IntArray:
    return positions(local_seq * problem.world_size, problem.world_size, rank, problem.layout).numpy()


@lru_cache(maxsize=4096)
def _plain(problem: Problem, local_seq: int, block: Compute) -> BlockMask:
    return _block_mask(problem, local_seq, block, None)


def _block_mask(problem: Problem, local_seq: int, block: Compute, documents: IntArray | None) -> BlockMask:
    queries = _narrow(_positions(problem, local_seq, block.queries), block.query_parts, problem.whole)
    keys = _narrow(_positions(problem, local_seq, block.keys), block.key_parts, problem.whole)
    rule = CAUSAL if problem.causal else FULL
    return BlockMask.of(rule.ranges(queries, local_seq * problem.world_size, documents), queries, keys)


class DocumentMasks:
    """Masks of one batch's documents. Every block's mask is made once, however many layers ask for it."""

    def __init__(self, problem: Problem, documents: IntArray) -> None:
        size, batch, local_seq = documents.shape
        self._problem, self._local_seq = problem, local_seq
        self._documents = np.empty((batch, size * local_seq), dtype=np.int64)
        for rank, ids in enumerate(documents):
            self._documents[:, _positions(problem, local_seq, rank)] = ids
        self._made: dict[Compute, BlockMask] = {}

    def __call__(self, block: Compute) -> BlockMask:
        if block not in self._made:
            self._made[block] = _block_mask(self._problem, self._local_seq, block, self._documents)
        return self._made[block]


def _gather(document_ids: Tensor, problem: Problem, group: dist.ProcessGroup | None) -> IntArray:
    """All ranks' document ids, ``[world_size, batch, local_seq]``: a remote block needs them, and they are small."""
    local = document_ids.to(torch.int64).contiguous()
    if problem.world_size == 1:
        return local.unsqueeze(0).cpu().numpy().copy()
    everywhere = [torch.empty_like(local) for _ in range(problem.world_size)]
    dist.all_gather(everywhere, local, group=group)
    return torch.stack(everywhere).cpu().numpy()


# Masks by the tensor of document ids: all layers of a model are called with the same one, so the ids are gathered once
# a batch. Every rank makes the same calls, so all of them find or miss an entry together.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def block_masks(
    problem: Problem, local_seq: int, document_ids: Tensor | None, group: dist.ProcessGroup | None
) -> Callable[[Compute], BlockMask]:
    """The mask of any block of this call. With documents this is a collective call, once for each new tensor of ids."""
    if document_ids is None:
        return lambda block: _plain(problem, local_seq, block)
    if document_ids.is_inference():  # such tensors have no version, so a change would go unseen
        return DocumentMasks(problem, _gather(document_ids, problem, group))
    key = (problem, id(group), document_ids._version)
    found = _known.get(document_ids)
    if found is None or found[0] != key:
        found = (key, DocumentMasks(problem, _gather(document_ids, problem, group)))
        _known[document_ids] = found
    return found[1]

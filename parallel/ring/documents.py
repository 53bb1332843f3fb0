"""The documents of a split sequence, brought together once a batch."""

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from fused.mask import Mask
from fused.tiles import IntArray
from parallel.layout import Layout
from parallel.ring.scene import Scene, plain_scene


def _gather(local: Tensor, keys: Layout, group: dist.ProcessGroup | None) -> IntArray:
    """The document ids of the whole sequence ``[batch, keys]``: every rank's blocks need them, and they are small."""
    longest = max(keys.lengths)
    padded = local.new_zeros(local.shape[0], longest, dtype=torch.int64)
    padded[:, : local.shape[1]] = local
    parts = [padded]
    if group is not None and len(keys.ranks) > 1:
        parts = [torch.empty_like(padded) for _ in keys.ranks]
        dist.all_gather(parts, padded, group=group)
    whole = np.empty((local.shape[0], keys.bounds.stop), dtype=np.int64)
    for rank, part in enumerate(parts):
        whole[:, keys.positions(rank)] = part[:, : keys.lengths[rank]].cpu().numpy()
    return whole


# Scenes by the tensor of document ids: all layers of a model are called with the same one. Every rank makes the same
# calls, so all of them find or miss an entry together.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


def scene_of(
    queries: Layout,
    keys: Layout,
    mask: Mask,
    heads: tuple[int, int],
    documents: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Scene:
    """The scene of a call with ``heads`` query and key heads. With documents this is a collective call, once for each
    new tensor of ids."""
    if documents is None:
        return plain_scene(queries, keys, mask, *heads)
    if documents.is_inference():  # such tensors have no version, so a change would go unseen
        return Scene(queries, keys, mask, *heads, _gather(documents, keys, group))
    key = (queries, keys, mask, heads, id(group), documents._version)
    found = _known.get(documents)
    if found is None or found[0] != key:
        found = (key, Scene(queries, keys, mask, *heads, _gather(documents, keys, group)))
        _known[documents] = found
    return found[1]

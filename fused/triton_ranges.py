"""What the backward kernel needs to know of a mask: for each tile of keys, the queries that see some or all of it."""

from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fused.mask import BlockMask
from fused.tiles import IntArray

_made: WeakKeyDictionary[BlockMask, dict[object, Tensor]] = WeakKeyDictionary()


def on_device(mask: BlockMask, block_q: int, block_k: int, device: torch.device) -> Tensor:
    """:func:`query_ranges` of a mask as an int32 tensor on a device, made once for as long as the mask lives."""
    made = _made.setdefault(mask, {})
    key = (block_q, block_k, device)
    if key not in made:
        ranges = query_ranges(mask.start, mask.stop, mask.keys, block_q, block_k)
        made[key] = torch.from_numpy(ranges.astype(np.int32)).to(device)
    return made[key]


def query_ranges(start: IntArray, stop: IntArray, keys: int, block_q: int, block_k: int) -> IntArray:
    """For each tile of keys the query rows ``first, full, ragged, last``, ``[batch or 1, key tiles, 4]``.

    No row outside ``[first, last)`` sees a key of the tile; every row of ``[full, ragged)``, whole query tiles, sees
    all of it. Right for any ranges ``[start, stop)``, and tight where neither end falls from one query to the next.
    """
    batch, rows = start.shape
    key = np.arange(0, keys, block_k)[:, None]
    padding = ((0, 0), (0, -rows % block_q))
    start, stop = (np.pad(side, padding).reshape(batch, -1, block_q) for side in (start, stop))
    sees = start < stop
    lowest, highest = np.where(sees, start, keys).min(-1), np.where(sees, stop, 0).max(-1)
    touched = (lowest[:, None] < key + block_k) & (highest[:, None] > key)  # [batch, key tiles, query tiles]
    whole = (start.max(-1)[:, None] <= key) & (stop.min(-1)[:, None] >= key + block_k)
    count = touched.shape[-1]
    first, last = _first(touched, 0), count - _first(touched[..., ::-1], count)
    full = _first(whole, first)
    ragged = _first(~whole & (np.arange(count) >= full[..., None]), count)
    return np.stack([first, full, ragged, last], -1) * block_q


def _first(flags: NDArray[np.bool_], otherwise: int | IntArray) -> IntArray:
    """The index of the first True along the last dim."""
    return np.where(flags.any(-1), flags.argmax(-1), otherwise)

"""What stands between the products of a pass of few rows, each piece one compiled loop on one core.

Where a pass has one row for every text, its products only stream the weights; norms, rotations, writes to the cache and
attention over short texts are then dozens of small operators, whose calls take longer than their arithmetic. These
loops do the same arithmetic in fp32; ``model_runner`` and ``paged_attention`` hold the torch forms, which tests compare
with them.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inference.loss_rows import normalise

FEW_ROWS = 16  # rows of a pass up to which one core's loops are faster than torch's operators
SHORT = 512  # tokens up to which one core attends faster than torch's operator begins

Array = npt.NDArray[Any]
Reach = tuple[int, int, int]  # (row, start, end): the row sees these slots of the cache


def norm(x_TE: Tensor, weight: Array, eps: Any) -> Tensor:
    """RMSNorm of each row."""
    out = torch.empty_like(x_TE)
    size: Any = np.float32(len(weight))
    normalise(x_TE.numpy(), weight, eps, size, out.numpy())
    return out


def add_and_norm(x_TE: Tensor, more_TE: Tensor, weight: Array, eps: Any) -> tuple[Tensor, Tensor]:
    """The sum, and its RMSNorm."""
    total, out = torch.empty_like(x_TE), torch.empty_like(x_TE)
    _add_and_norm(x_TE.numpy(), more_TE.numpy(), weight, eps, total.numpy(), out.numpy())
    return total, out


def turn_and_keep(qkv_THD: Tensor, turns: Array, store: Array, slots: Array) -> None:
    """Rotate the query and key heads in place, and put keys and values into a layer's cache
    [2 kv_heads, slots, D]; ``turns`` [rows, 1, D / 2] is complex, of neighbouring pairs of features."""
    _turn_and_keep(qkv_THD.numpy(), turns, store, slots)


def gated(both_TF: Tensor) -> Tensor:
    """``silu(gate) * up`` of [rows, gate and up]."""
    out = both_TF.new_empty(both_TF.shape[0], both_TF.shape[1] // 2)
    _gated(both_TF.numpy(), out.numpy())
    return out


class Reaches:
    """The rows that attend over slots of the cache alone, their own tokens included."""

    def __init__(self, reaches: Sequence[Reach]) -> None:
        self.rows = {row for row, _, _ in reaches}
        self._reaches = np.array(sorted(reaches), np.int64).reshape(-1, 3)
        longest: dict[int, int] = {}
        for row, start, end in reaches:
            longest[row] = longest.get(row, 0) + end - start
        self._longest = max(longest.values(), default=0)
        self._scratch: Array = np.empty((0, 0), np.float32)

    def attend(self, q_TKGD: Tensor, store: Array, out_TN: Tensor) -> None:
        """Fill these rows of ``out_TN`` [rows, heads * D] with attention over a layer's cache."""
        group = q_TKGD.shape[2]
        _attend(q_TKGD.flatten(1, 2).numpy(), group, store, self._reaches, self._logits(group), out_TN.numpy())

    def turn_keep_attend(self, qkv_THD: Tensor, turns: Array, store: Array, slots: Array) -> Tensor:
        """``turn_and_keep`` and the attention of all rows, [rows, heads * D]."""
        rows, heads, width = qkv_THD.shape
        heads -= store.shape[0]
        group = 2 * heads // store.shape[0]
        out_TN = qkv_THD.new_empty(rows, heads * width)
        qkv, logits = qkv_THD.numpy(), self._logits(group)
        _turn_keep_attend(qkv, turns, store, slots, group, self._reaches, logits, out_TN.numpy())
        return out_TN

    def _logits(self, group: int) -> Array:
        if len(self._scratch) != group:
            self._scratch = np.empty((group, self._longest), np.float32)
        return self._scratch


def warm_up() -> None:
    """Compile all, or read it from numba's cache, before somebody waits for it."""
    qkv, turns, slots = torch.zeros(1, 3, 4), np.ones((1, 1, 2), np.complex64), np.zeros(1, np.int64)
    store, weight, eps = np.zeros((2, 2, 4), np.float32), np.ones(4, np.float32), np.float32(1e-5)
    norm(torch.ones(1, 4), weight, eps)
    add_and_norm(torch.ones(1, 4), torch.ones(1, 4), weight, eps)
    gated(torch.zeros(1, 4))
    turn_and_keep(qkv, turns, store, slots)
    reaches = Reaches([(0, 0, 1)])
    reaches.attend(qkv[:, :1].unflatten(1, (1, 1)), store, torch.empty(1, 4))
    reaches.turn_keep_attend(qkv, turns, store, slots)


_compiled = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})


@_compiled
def _add_and_norm(x: Array, more: Array, weight: Array, eps: float, sums: Array, out: Array) -> None:
    width = x.shape[1]
    for row in range(x.shape[0]):
        squares = np.float32(0.0)
        for dim in range(width):
            value = x[row, dim] + more[row, dim]
            sums[row, dim] = value
            squares += value * value
        scale = np.float32(1.0) / np.sqrt(squares / np.float32(width) + eps)
        for dim in range(width):
            out[row, dim] = sums[row, dim] * scale * weight[dim]


@_compiled
def _turn_and_keep(qkv: Array, turns: Array, store: Array, slots: Array) -> None:
    held = store.shape[0]
    queries = qkv.shape[1] - held
    for row in range(qkv.shape[0]):
        for head in range(queries + held // 2):
            for pair in range(turns.shape[2]):
                cos, sin = turns[row, 0, pair].real, turns[row, 0, pair].imag
                first, second = qkv[row, head, 2 * pair], qkv[row, head, 2 * pair + 1]
                qkv[row, head, 2 * pair] = first * cos - second * sin
                qkv[row, head, 2 * pair + 1] = first * sin + second * cos
        for head in range(held):
            for dim in range(qkv.shape[2]):
                store[head, slots[row], dim] = qkv[row, queries + head, dim]


@_compiled
def _gated(both: Array, out: Array) -> None:
    width = out.shape[1]
    for row in range(out.shape[0]):
        for place in range(width):
            gate = both[row, place]
            out[row, place] = gate / (np.float32(1.0) + np.exp(-gate)) * both[row, width + place]


@_compiled
def _attend(queries: Array, group: int, store: Array, reaches: Array, logits: Array, out: Array) -> None:
    kv_heads, width = store.shape[0] // 2, store.shape[2]
    first = 0
    while first < reaches.shape[0]:
        row, behind = reaches[first, 0], first + 1
        while behind < reaches.shape[0] and reaches[behind, 0] == row:
            behind += 1
        for head in range(kv_heads):
            mine = queries[row, head * group : (head + 1) * group]
            _weigh(mine, store[head], reaches[first:behind], logits)
            target = out[row, head * group * width : (head + 1) * group * width].reshape(group, width)
            _gather(logits, store[kv_heads + head], reaches[first:behind], target)
        first = behind


@_compiled
def _weigh(queries: Array, keys: Array, reaches: Array, logits: Array) -> None:
    """The softmax of some queries' products with the keys that they see."""
    group, width = queries.shape
    scale = np.float32(1.0 / np.sqrt(width))
    count = 0
    for reach in range(reaches.shape[0]):
        for slot in range(reaches[reach, 1], reaches[reach, 2]):
            for member in range(group):
                total = np.float32(0.0)
                for dim in range(width):
                    total += queries[member, dim] * keys[slot, dim]
                logits[member, count] = total * scale
            count += 1
    for member in range(group):
        most = logits[member, 0]
        for place in range(1, count):
            most = max(most, logits[member, place])
        total = np.float32(0.0)
        for place in range(count):
            weight = np.exp(logits[member, place] - most)
            logits[member, place] = weight
            total += weight
        for place in range(count):
            logits[member, place] /= total


@_compiled
def _gather(weights: Array, values: Array, reaches: Array, out: Array) -> None:
    """The sum of the values that some queries see, by their weights."""
    group, width = out.shape
    out[:] = np.float32(0.0)
    count = 0
    for reach in range(reaches.shape[0]):
        for slot in range(reaches[reach, 1], reaches[reach, 2]):
            for member in range(group):
                weight = weights[member, count]
                for dim in range(width):
                    out[member, dim] += weight * values[slot, dim]
            count += 1


@_compiled
def _turn_keep_attend(
    qkv: Array, turns: Array, store: Array, slots: Array, group: int, reaches: Array, logits: Array, out: Array
) -> None:
    _turn_and_keep(qkv, turns, store, slots)
    _attend(qkv, group, store, reaches, logits, out)

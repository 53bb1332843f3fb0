"""Dropout of attention weights by counter: whether a weight is dropped depends on nothing but the seed and where it is.

Bits come from a hash of (seed, batch row, head, position of the query, position of the key), so every way of splitting
the sequence or the heads over ranks drops the same weights, forward and backward, and nothing has to be stored.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: neighbouring counters start far apart


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, kept in int64 (Wellons' lowbias32: two rounds of xor-shift and multiply)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _WORD
    return x ^ (x >> 16)


@dataclass(frozen=True)
class Dropout:
    """Weights are dropped with probability ``rate``, the others grow by ``1 / (1 - rate)``.

    ``head`` is the index, in the whole model, of the first head of the tensors at hand.
    """

    rate: float
    seed: int
    head: int = 0

    def factors(self, batch: int, heads: int, queries: Tensor, keys: Tensor) -> Tensor:
        """What the weights are multiplied by, fp32 ``[batch, heads, Sq, Sk]``, at absolute positions ``[Sq], [Sk]``.

        With words of 32 bits: ``bits = mix(mix(mix(mix(mix(seed) + golden * batch) + golden * head) + query) + key)``;
        a weight is kept where ``bits >= rate * 2^32``.
        """
        device = queries.device
        bits = mix(torch.tensor(self.seed & _WORD, dtype=torch.int64, device=device))
        bits = mix((bits + _GOLDEN * torch.arange(batch, device=device)) & _WORD)
        bits = mix((bits[:, None] + _GOLDEN * torch.arange(self.head, self.head + heads, device=device)) & _WORD)
        bits = mix((bits[:, :, None] + queries) & _WORD)
        bits = mix((bits[..., None] + keys) & _WORD)
        kept = bits >= round(self.rate * 2**32)
        return kept * torch.tensor(1.0 / (1.0 - self.rate), dtype=torch.float32, device=device)

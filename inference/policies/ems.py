"""Evict-then-merge: a global and a local score, and what falls out is merged into what is like it (EMS,
arXiv:2412.08521, sections 3.2 and 3.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.policies.base import SINKS, CacheShape, ScoredPolicy, taken, widened

WINDOW = 32  # last rows that the local score looks from
SIMILAR = 0.6  # cosine of two keys from which on they are merged


class EMS(ScoredPolicy):
    """Keeps sinks, recent tokens and the best scored ones; as many of the next best are merged into those.

    The score is the sum of the attention of the last ``WINDOW`` rows and that of all rows, brought to the same mean. A
    merged token goes to the kept one whose key is most like its own; keys and values become means weighted by score.
    One that is like none is evicted (the paper's zero class), and so are all others.
    """

    recent_share = 0.25

    def __init__(self, shape: CacheShape, budget: float, prompt_tokens: int, seed: int, similar: float = SIMILAR):
        self._similar = similar
        super().__init__(shape, budget, prompt_tokens, seed)

    def reset(self) -> None:
        super().reset()
        self._local_LKT = torch.zeros_like(self.mass_LKT)

    def observe(self, layer: int, logits_KGST: Tensor, written: int) -> None:
        weights = self.weights(layer, logits_KGST)
        self.mass_LKT, self._local_LKT = widened(self.mass_LKT, written), widened(self._local_LKT, written)
        self.mass_LKT[layer, :, :written] += weights.sum((1, 2))[:, :written]
        last = weights[:, :, -WINDOW:]
        self._local_LKT[layer] *= 1 - last.shape[2] / WINDOW  # what the newest rows do not replace
        self._local_LKT[layer, :, :written] += last.sum((1, 2))[:, :written]

    def score(self, layer: int, held: int) -> Tensor:
        """[kv_heads, held]"""
        total, local = self.mass_LKT[layer, :, :held], self._local_LKT[layer, :, :held]
        scale = local.mean(1, keepdim=True) / total.mean(1, keepdim=True).clamp_min(1e-12)
        return local + total * scale

    def compress(self, layer: int, keys_KTD: Tensor, values_KTD: Tensor, count: int) -> tuple[Tensor, Tensor]:
        held = keys_KTD.shape[1]
        score_KT = self.score(layer, held)
        ranked_KT = score_KT.clone()
        ranked_KT[:, :SINKS] = ranked_KT[:, held - round(self.recent_share * count) :] = torch.inf
        order_KT = ranked_KT.sort(dim=1, descending=True, stable=True).indices
        keep_Kn = order_KT[:, :count].sort(1).values
        next_Km = order_KT[:, count : 2 * count]
        keys_KnD, values_KnD = taken(keys_KTD, keep_Kn), taken(values_KTD, keep_Kn)
        next_keys, next_values = taken(keys_KTD, next_Km), taken(values_KTD, next_Km)
        likeness_Kmn = F.normalize(next_keys.float(), dim=2) @ F.normalize(keys_KnD.float(), dim=2).transpose(1, 2)
        best_Km, target_Km = likeness_Kmn.max(2)
        weight_Km = score_KT.gather(1, next_Km) * (best_Km > self._similar)
        weight_Kn = score_KT.gather(1, keep_Kn).clamp_min(1e-12)
        total_Kn = weight_Kn.scatter_add(1, target_Km, weight_Km)

        def merged(kept: Tensor, fallen: Tensor) -> Tensor:
            sums = kept.float() * weight_Kn[..., None]
            sums.scatter_add_(1, target_Km[..., None].expand_as(fallen), fallen.float() * weight_Km[..., None])
            return (sums / total_Kn[..., None]).to(kept.dtype)

        result = merged(keys_KnD, next_keys), merged(values_KnD, next_values)
        self.forget(layer, keep_Kn)
        local = self._local_LKT[layer].gather(1, keep_Kn)
        self._local_LKT[layer].zero_()
        self._local_LKT[layer, :, :count] = local
        return result

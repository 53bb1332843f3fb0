"""Attention to the clusters of a context near a query (Squeezed Attention, arXiv:2411.09688, section 4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.policies.base import PROBE, CacheShape, KVPolicy

CLUSTER_TOKENS = 20  # tokens of the fixed context for each cluster (5 %, as in the paper)
ROUNDS = 5  # of k-means


class Squeezed(KVPolicy):
    """Clusters the prompt's keys once, when it has been read, and reads those of the clusters nearest to each query.

    The prompt but for its last ``PROBE`` tokens is the fixed context; the rest and the output are always read. Clusters
    are those of the directions of keys (k-means on unit keys), a centroid is the mean of its keys. A head orders the
    clusters by exp(q c) and reads the first of them that hold its budget of tokens; the paper's calibrated threshold on
    exp(q c) / sum(N_c exp(q c)) orders them in the same way, but lets heads read different numbers of tokens.
    """

    selects = True

    def __init__(self, shape: CacheShape, budget: float, prompt_tokens: int, seed: int) -> None:
        super().__init__(shape, budget, prompt_tokens, seed)
        self.reset()

    def reset(self) -> None:
        self._clusters: dict[int, tuple[Tensor, Tensor]] = {}  # layer: centroids [K, C, D], cluster of token [K, T]

    def select(self, layer: int, q_SKGD: Tensor, keys: list[Tensor]) -> Tensor | None:
        held = sum(part.shape[1] for part in keys)
        fixed = self.prompt_tokens - PROBE
        if held <= self.prompt_tokens or self.limit(held) >= held or fixed < 2 * CLUSTER_TOKENS:
            return None  # the prompt is read exactly
        if layer not in self._clusters:
            together_KTD = torch.cat(keys, 1)[:, :fixed].float()
            self._clusters[layer] = clustered(together_KTD, -(-fixed // CLUSTER_TOKENS), self.seed + layer)
        centroids_KCD, member_KT = self._clusters[layer]
        near_KGC = (q_SKGD.float().mean(0) @ centroids_KCD.transpose(1, 2)) * q_SKGD.shape[3] ** -0.5
        near_KC = near_KGC.softmax(2).sum(1)  # heads that read the same keys want one set
        count = max(1, min(fixed, self.limit(held) - (held - fixed)))
        near_KT = near_KC.gather(1, member_KT)
        chosen_Kn = near_KT.topk(count, 1).indices
        rest = torch.arange(fixed, held).expand(chosen_Kn.shape[0], -1)
        return torch.cat((chosen_Kn, rest), 1)


def clustered(keys_KTD: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor]:
    """k-means of the keys' directions in every head: means of the raw keys [K, clusters, D], cluster of each [K, T]."""
    heads, tokens, _ = keys_KTD.shape
    unit_KTD = F.normalize(keys_KTD, dim=2)
    start = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))[:clusters]
    centre_KCD = unit_KTD[:, start]
    member_KT = torch.zeros(heads, tokens, dtype=torch.long)
    for _ in range(ROUNDS):
        member_KT = (unit_KTD @ centre_KCD.transpose(1, 2)).argmax(2)
        sums, number = _sums(unit_KTD, member_KT, clusters)
        centre_KCD = torch.where(number > 0, F.normalize(sums, dim=2), centre_KCD)
    sums, number = _sums(keys_KTD, member_KT, clusters)
    return sums / number.clamp_min(1), member_KT


def _sums(x_KTD: Tensor, member_KT: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    heads, _, width = x_KTD.shape
    sums = x_KTD.new_zeros(heads, clusters, width)
    sums.scatter_add_(1, member_KT[..., None].expand_as(x_KTD), x_KTD)
    number = x_KTD.new_zeros(heads, clusters).scatter_add_(1, member_KT, torch.ones_like(member_KT, dtype=x_KTD.dtype))
    return sums, number[..., None]

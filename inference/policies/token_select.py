"""Attention to the tokens that the heads vote for (TokenSelect, arXiv:2411.02886, sections 4.1 to 4.3)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from inference.policies.base import SINKS, CacheShape, KVPolicy

LOCAL = 64  # last tokens that are always read
ALIKE = 0.9  # cosine to the query of the last selection from which on it is used again


class TokenSelect(KVPolicy):
    """Reads the first and the last tokens and those in between with the largest sum over heads of softmax(q k).

    The query of a chunk is the mean of its rows' queries. Nothing is evicted: another query may want other tokens. A
    layer keeps its selection while its query stays alike, and the tokens since then are read with it. Positions stay
    the tokens' own (the paper renumbers them, to go beyond a model's context).
    """

    selects = True

    def __init__(self, shape: CacheShape, budget: float, prompt_tokens: int, seed: int, alike: float = ALIKE) -> None:
        super().__init__(shape, budget, prompt_tokens, seed)
        self._alike = alike
        self.reset()

    def reset(self) -> None:
        self._chosen: dict[int, tuple[Tensor, Tensor, int]] = {}  # layer: query, indices, length then
        self.reused = 0  # selections

    def chunk(self, held: int, pending: int, rows: int) -> tuple[int, int]:
        """The prompt's last token has a pass, and so a selection, of its own: among many rows a question is lost."""
        return min(rows, max(1, pending - 1)), 0

    def select(self, layer: int, q_SKGD: Tensor, keys: list[Tensor]) -> Tensor | None:
        held = sum(part.shape[1] for part in keys)
        count = min(held, max(SINKS + LOCAL, self.limit(held)))
        if count >= held:
            return None
        query_KGD = q_SKGD.float().mean(0)
        if layer in self._chosen:
            query, chosen, length = self._chosen[layer]
            if held - length < LOCAL and F.cosine_similarity(query, query_KGD.flatten(), 0) >= self._alike:
                self.reused += 1
                return torch.cat((chosen, torch.arange(length, held)))
        middle = count - SINKS - LOCAL
        scale = query_KGD.shape[2] ** -0.5
        logits_KGT = torch.cat([query_KGD.to(part.dtype) @ part.transpose(1, 2) for part in keys], 2).float()
        votes_T = (logits_KGT[..., SINKS : held - LOCAL] * scale).softmax(2).sum((0, 1))
        best = votes_T.topk(middle).indices.sort().values + SINKS
        chosen = torch.cat((torch.arange(SINKS), best, torch.arange(held - LOCAL, held)))
        self._chosen[layer] = (query_KGD.flatten(), chosen, held)
        return chosen

"""Candidates that were likely after a token before are guesses when the token comes again (Token Recycling,
arXiv:2408.08696, section 3)."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from inference.drafters.base import Child, Successors
from inference.generation import Generation

WIDTH = 8  # successors kept for each token
TENANTS = 16  # adjacency matrices that are kept, by the salt of their texts


class TokenRecycling(Successors):
    """An adjacency matrix [vocabulary, ``WIDTH``] of the likeliest successors, refreshed by every verified row.

    It outlives texts, so there is one for each tenant's salt: what one tenant's texts were likely to say is not guessed
    for another's. The paper's fixed tree of 80 nodes is too many for a CPU; the tree here is grown by measured rates.
    """

    first_rates: Sequence[float] = (0.45, 0.12, 0.06, 0.04, 0.03, 0.02, 0.02, 0.01)

    def __init__(self, vocab: int) -> None:
        self._vocab = vocab
        self._matrices: OrderedDict[bytes, Tensor] = OrderedDict()

    def root(self, generation: Generation) -> tuple[Tensor, int]:
        return self._matrix(generation), generation.tokens[-1]

    def children(self, state: tuple[Tensor, int]) -> list[Child]:
        matrix_VW, token = state
        successors = matrix_VW[token].tolist()
        return [(child, rank, (matrix_VW, child)) for rank, child in enumerate(successors) if child >= 0]

    def learn(self, generation: Generation, tokens: Sequence[int], path: Sequence[int], logits_RV: Tensor) -> None:
        wrong = [row for row in range(len(tokens)) if row not in path]
        order = [*wrong, *path]  # of several rows of one token the accepted one counts
        latest = {tokens[row]: row for row in order}
        successors = logits_RV[list(latest.values())].topk(min(WIDTH, self._vocab), 1).indices
        self._matrix(generation)[list(latest)] = successors.to(torch.int32)

    def forget(self, generation: Generation) -> None:
        """Nothing: the matrix is the tenant's."""

    def _matrix(self, generation: Generation) -> Tensor:
        salt = generation.salt
        if salt not in self._matrices:
            self._matrices[salt] = torch.full((self._vocab, min(WIDTH, self._vocab)), -1, dtype=torch.int32)
            if len(self._matrices) > TENANTS:
                self._matrices.popitem(last=False)
        self._matrices.move_to_end(salt)
        return self._matrices[salt]

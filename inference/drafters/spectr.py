"""Several sampled drafts and their verification by optimal transport with membership cost, up to a factor of
1 - 1/e (SpecTr's k-sequential selection, arXiv:2310.15141, section 4 and algorithm 2)."""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from inference.drafters.base import Draft
from inference.drafters.dynamic_tree import DraftModel, DynamicTree
from inference.generation import Generation
from inference.params import GREEDY

SEQUENCES = 2  # drafts that are sampled independently


class SpecTr(DynamicTree):
    """``SEQUENCES`` drafts sampled from the draft model; the output has the served model's distribution.

    Which of two equally distributed outputs comes of a seed differs from plain decoding. A greedy text is drafted as by
    ``DynamicTree``.
    """

    def __init__(self, model: DraftModel) -> None:
        super().__init__(model)
        self._open: WeakKeyDictionary[Generation, _Open] = WeakKeyDictionary()

    def draft(self, generation: Generation, rate: Callable[[int], float], most: int, depth: int) -> Draft:
        self._open.pop(generation, None)
        if generation.params.temperature == GREEDY:
            return super().draft(generation, rate, most, depth)
        draft, opened = Draft(), _Open()
        ends = [0] * SEQUENCES  # the row where each sequence is
        sampler, place = generation.sampler, generation.completion_tokens
        for level in range(max(1, min(depth, most // SEQUENCES))):
            logits_RV = self.model.logits(generation, draft.tokens, draft.parents)
            if logits_RV is None:
                break
            opened.rows = [*opened.rows, *(sampler.distribution(row_V) for row_V in logits_RV[len(opened.rows) :])]
            for index, row in enumerate(ends):
                total = opened.rows[row].cumsum(0)
                draw = sampler.uniform(place, 1 + level * SEQUENCES + index) * float(total[-1])
                token = min(int(torch.searchsorted(total, draw, right=True)), len(total) - 1)
                nodes = list(zip(draft.tokens, draft.parents, strict=True))
                if (token, row) not in nodes:
                    above = draft.chances[row - 1] if row else 1.0
                    draft.add(token, row, index, above * float(opened.rows[row][token]))
                    nodes.append((token, row))
                ends[index] = nodes.index((token, row)) + 1
                opened.drawn.setdefault(row, []).append(token)
        self._open[generation] = opened
        return draft

    def pick(self, generation: Generation, row: int, logits_V: Tensor) -> int | None:
        """The token behind a row of the draft, from the row's logits; None: let the sampler choose."""
        opened = self._open.get(generation)
        if opened is None or row not in opened.drawn or row >= len(opened.rows):
            return None
        target_V = generation.sampler.distribution(logits_V)
        place = generation.completion_tokens
        draws = [generation.sampler.uniform(place, 1001 + index) for index in range(len(opened.drawn[row]) + 1)]
        return k_sequential(target_V, opened.rows[row], opened.drawn[row], draws)


class _Open:
    """A draft that waits for its verification: what each row's distribution was and what was drawn from it."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.drawn: dict[int, list[int]] = {}


def k_sequential(target_V: Tensor, draft_V: Tensor, drawn: Sequence[int], draws: Sequence[float]) -> int:
    """A token distributed as ``target_V``, one of ``drawn`` (independent draws from ``draft_V``) where possible.

    ``draws`` are uniform numbers, one for each drawn token and one more. Both distributions are fp64 and sum to 1.
    """
    count = len(drawn)
    factor = acceptance_factor(target_V, draft_V, count)
    for token, draw in zip(drawn, draws, strict=False):
        if draw * factor * float(draft_V[token]) < float(target_V[token]):
            return token
    overlap_V = torch.minimum(draft_V, target_V / factor)
    beta = float(overlap_V.sum())
    rest_V = target_V if beta <= 0 else target_V - overlap_V * ((1 - (1 - beta) ** count) / beta)
    total = rest_V.clamp_min(0).cumsum(0)
    if float(total[-1]) <= 0:  # rounding: the drafts cover the target
        total = target_V.cumsum(0)
    return min(int(torch.searchsorted(total, draws[count] * float(total[-1]), right=True)), len(total) - 1)


def acceptance_factor(target_V: Tensor, draft_V: Tensor, count: int) -> float:
    """The solution in [1, count] of 1 - (1 - b)^count = r b with b = sum min(draft, target / r) (section 4)."""
    low, high = 1.0, float(count)
    for _ in range(30):
        middle = (low + high) / 2
        beta = float(torch.minimum(draft_V, target_V / middle).sum())
        if 1 - (1 - beta) ** count > middle * beta:
            low = middle
        else:
            high = middle
    return high

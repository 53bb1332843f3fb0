"""Drafts: guesses of the next tokens, verified in one forward pass, so that several tokens may come of it.

A draft is a tree behind a text's last token. Each of its tokens is a row of the pass, and what the sampler would choose
at a row decides whether the row's child is right: the random number belongs to the place in the output, not to the
pass, so drafting changes neither greedy nor seeded nor unseeded outputs, only how many passes they take. (``spectr``
alone draws on its own: its sampled outputs have the same distribution, not the same tokens.)

Guesses come from one of ``inference.drafters``. On a CPU a row costs time, so ``DraftSize`` weighs measured costs
against each text's record (as PPD does for its trees, arXiv:2405.18628, section 4.3) and drafts
nothing where that does not pay. A text begins with one guess at a time and gets more as they prove right.
"""

import time
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from inference.drafters.base import Draft, Source
from inference.drafters.dynamic_tree import DraftModel, DynamicTree
from inference.drafters.ngram import Ngram
from inference.drafters.spectr import SpecTr
from inference.drafters.token_recycling import TokenRecycling
from inference.drafters.trie import Trie
from inference.generation import Generation

BUSY = 4  # texts being continued from which on nothing is drafted: the pass is full of rows that are sure to count
MEMORY = 0.85  # weight of the record against the newest guess
PROBE = 32  # chances after which a text whose drafts did not pay gets another
MARGIN = 1.02  # gain below which a draft is not worth its uncertainty
FIRST_LOSS = 0.25  # of a pass, that a text's drafts may lose before they have gained anything,
LOSS = 0.01  # and more for each token of its output
DEPTH = 6  # levels of a draft model's tree at most


class DraftSize:
    """How many guesses to verify: the number with the most tokens for the time of a pass.

    ``costs[rows]`` is the time of a pass of that many rows, for 1 to ``most + BUSY`` rows, in seconds.
    """

    def __init__(self, costs: dict[int, float], most: int) -> None:
        self.costs, self.most = costs, most

    def best(self, chances: Sequence[float], texts: int, sec_per_guess: float = 0.0) -> int:
        """For one of ``texts`` texts, of guesses that are right, with all above them, with these ``chances``; each
        costs ``sec_per_guess`` before it is verified."""
        best, most_worth = 0, MARGIN * texts / self.costs[texts]
        gain = 0.0
        for size, chance in enumerate(chances[: self.most], 1):
            gain += chance
            worth = (texts + gain) / (self.costs[texts + size] + size * sec_per_guess)
            if worth > most_worth:
                best, most_worth = size, worth
        return best

    def gain(self, texts: int, guesses: int, right: int) -> float:
        """Seconds that a draft saved against as many tokens by passes without one; below 0: that it lost."""
        return (texts + right) * self.costs[texts] / texts - self.costs[texts + guesses]

    def allowed_loss(self, texts: int, tokens: int) -> float:
        """Seconds that the drafts of a text with an output of so many tokens may have lost."""
        return (FIRST_LOSS + LOSS * tokens) * self.costs[texts] / texts


class Record:
    """How one text's guesses have fared."""

    def __init__(self, first_rates: Sequence[float]) -> None:
        self._rates = list(first_rates)
        self.most = 1  # guesses in the next draft
        self.passed = 0  # chances since the last draft
        self.gained = 0.0  # seconds by all drafts
        self.texts = 1  # in the pass of the last draft

    def rate(self, rank: int) -> float:
        """The share of guesses of this rank that were right where all above them were."""
        return self._rates[min(rank, len(self._rates) - 1)]

    def judge(self, rank: int, right: bool) -> None:
        """One more of them."""
        rank = min(rank, len(self._rates) - 1)
        self._rates[rank] = MEMORY * self._rates[rank] + (1 - MEMORY) * right


class Drafter:
    """Drafts for all texts of an engine. What sources remember beyond a text is kept by tenant."""

    def __init__(self, size: DraftSize, texts: Callable[[], int], vocab: int, model: DraftModel | None) -> None:
        self.size, self._texts = size, texts
        self.drafted = self.right = 0
        self.sources: dict[str, Source] = {
            "ngram": Ngram(),
            "token_recycling": TokenRecycling(vocab),
            "trie": Trie(),
        }
        if model is not None:
            self.sources["dynamic_tree"], self.sources["spectr"] = DynamicTree(model), SpecTr(model)
        self._records: WeakKeyDictionary[Generation, Record] = WeakKeyDictionary()
        self._open: WeakKeyDictionary[Generation, Draft] = WeakKeyDictionary()
        self._level_sec = 0.0  # of a draft model's pass, with what is around it

    def propose(self, generation: Generation, room: int) -> tuple[list[int], list[int]]:
        """(tokens, parents) of a draft of at most ``room`` tokens; parent 0 is the text's own last token."""
        source = self.sources.get(generation.drafter)
        if source is None or self._texts() >= BUSY:
            return [], []
        record = self._records.setdefault(generation, Record(source.first_rates))
        record.passed += 1
        texts, rate = max(1, self._texts()), record.rate(0)
        if record.gained < -self.size.allowed_loss(texts, generation.completion_tokens):
            return [], []
        most = min(room, self.size.most)
        level_sec = self._level_sec if isinstance(source, DynamicTree) else 0.0
        depth = self.size.best([rate**level for level in range(1, min(most, DEPTH) + 1)], texts, level_sec)
        probing = record.passed >= PROBE
        if most < 1 or not (depth or probing):
            return [], []
        most = min(most, record.most)
        depth = max(1, min(depth, most))
        start = time.perf_counter()
        draft = source.draft(generation, record.rate, most, depth)
        record.texts = texts
        if isinstance(source, DynamicTree):
            taken = time.perf_counter() - start
            record.gained -= taken
            taken /= depth
            self._level_sec = MEMORY * self._level_sec + (1 - MEMORY) * taken if self._level_sec else taken
        draft = draft.first(max(self.size.best(draft.chances, texts), int(probing)))
        if not draft.tokens:
            return [], []
        record.passed = 0
        self._open[generation] = draft
        return draft.tokens, draft.parents

    def pick(self, generation: Generation, row: int, logits_V: Tensor) -> int | None:
        """The token behind a verified row where the drafter has a rule of its own; None: the sampler's."""
        source = self.sources.get(generation.drafter)
        return source.pick(generation, row, logits_V) if isinstance(source, SpecTr) else None

    def learn(self, generation: Generation, tokens: Sequence[int], path: Sequence[int], logits_RV: Tensor) -> None:
        """Count a verified draft: ``tokens`` with the text's own first, ``path`` the rows that were right."""
        right = len(path) - 1
        self.drafted += len(tokens) - 1
        self.right += right
        draft = self._open.pop(generation, None)
        source = self.sources.get(generation.drafter)
        if draft is None or source is None:
            return
        record = self._records[generation]
        record.most = 2 + 4 * right if right else 1
        record.gained += self.size.gain(record.texts, len(tokens) - 1, right)
        if isinstance(source, DynamicTree):
            for level in range(min(right + 1, max(_depths(draft)))):
                record.judge(0, level < right)
        else:
            for row, (parent, rank) in enumerate(zip(draft.parents, draft.ranks, strict=True), 1):
                if parent in path:
                    record.judge(rank, row in path)
        source.learn(generation, tokens, path, logits_RV)

    def see(self, generation: Generation, logits_1V: Tensor) -> None:
        """The logits behind a text's last token, of a pass without a draft."""
        source = self.sources.get(generation.drafter)
        if source is not None:
            source.learn(generation, generation.tokens[-1:], [0], logits_1V)

    def forget(self, generation: Generation) -> None:
        """The text has ended."""
        source = self.sources.get(generation.drafter)
        if source is not None:
            source.forget(generation)


def _depths(draft: Draft) -> list[int]:
    found: list[int] = []
    for parent in draft.parents:
        found.append(1 + (found[parent - 1] if parent else 0))
    return found

"""Drafts: guesses of the next tokens, verified in one forward pass, so that several tokens may come of it.

A draft is a tree behind a text's last token. Each of its tokens is a row of the pass, and what the sampler would choose
at a row decides whether the row's child is right: the random number belongs to the place in the output, not to the
pass, so drafting changes neither greedy nor seeded nor unseeded outputs, only how many passes they take.

``Lookup`` continues the text as it went on after the last place that ended like it does now (prompt lookup, as in
LLMA, arXiv:2304.04487): right where an output copies its input, and free where nothing matches. On a CPU a row costs
time, so ``DraftSize`` weighs measured costs against each text's record (as PPD does for its trees, arXiv:2405.18628,
section 4.3) and drafts nothing where that does not pay.
"""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from inference.generation import Generation

LONGEST, SHORTEST = 4, 2  # tokens at the end of a text that must occur before
BUSY = 4  # texts being continued from which on nothing is drafted: the pass is full of rows that are sure to count
FIRST_RATE = 0.7  # of drafted tokens that are right, until there is a record
MEMORY = 0.85  # weight of the record against the newest draft
PROBE = 32  # chances after which a text whose drafts did not pay gets another


class Lookup:
    """Where each run of tokens last occurred in one text."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # run -> place behind it
        self._seen = 0

    def continuation(self, tokens: Sequence[int], most: int) -> list[int]:
        """What followed the longest earlier run that equals the end of ``tokens``; at most ``most`` tokens."""
        for end in range(max(self._seen, SHORTEST), len(tokens)):  # runs that something follows
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - size : end])] = end
        self._seen = len(tokens)
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            place = self._after.get(tuple(tokens[-size:]))
            if place is not None:
                return list(tokens[place : place + most])
        return []


class DraftSize:
    """How many tokens to draft: the number with the most tokens for the time of a pass.

    ``costs[rows]`` is the time of a pass of that many rows, for 1 to ``most + BUSY`` rows, in any unit.
    """

    def __init__(self, costs: dict[int, float], most: int) -> None:
        self.costs, self.most = costs, most

    def best(self, rate: float, texts: int) -> int:
        """For one of ``texts`` texts whose drafted tokens have been right at ``rate``."""
        best, most_worth = 0, texts / self.costs[texts]
        gain = 0.0
        for size in range(1, self.most + 1):
            gain += rate**size
            worth = (texts + gain) / self.costs[texts + size]
            if worth > most_worth:
                best, most_worth = size, worth
        return best


class Drafter:
    """Drafts for all texts of an engine; nothing of a text outlives it or reaches another."""

    def __init__(self, size: DraftSize, texts: Callable[[], int]) -> None:
        self.size, self._texts = size, texts
        self.drafted = self.right = 0
        self._lookups: WeakKeyDictionary[Generation, Lookup] = WeakKeyDictionary()
        self._rates: WeakKeyDictionary[Generation, float] = WeakKeyDictionary()
        self._passed: WeakKeyDictionary[Generation, int] = WeakKeyDictionary()  # chances since the last draft

    def propose(self, generation: Generation, room: int) -> tuple[list[int], list[int]]:
        """(tokens, parents) of a draft of at most ``room`` tokens; parent 0 is the text's own last token."""
        if self._texts() >= BUSY:
            return [], []
        lookup = self._lookups.setdefault(generation, Lookup())
        tokens = lookup.continuation(generation.tokens, min(room, self.size.most))
        if not tokens:
            return [], []
        size = self.size.best(self._rates.get(generation, FIRST_RATE), max(1, self._texts()))
        if size == 0:
            self._passed[generation] = self._passed.get(generation, 0) + 1
            if self._passed[generation] < PROBE:
                return [], []
            size = 1
        self._passed[generation] = 0
        tokens = tokens[:size]
        return tokens, list(range(len(tokens)))

    def learn(self, generation: Generation, drafted: int, right: int) -> None:
        """Count a verified draft: ``right`` of its tokens, then one wrong one unless all were right."""
        self.drafted += drafted
        self.right += right
        judged = min(drafted, right + 1)
        rate = self._rates.get(generation, FIRST_RATE)
        for place in range(judged):
            rate = MEMORY * rate + (1 - MEMORY) * (place < right)
        self._rates[generation] = rate

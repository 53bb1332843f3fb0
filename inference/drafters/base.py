"""What a drafter is: it says which tokens may follow, and the tree of the likeliest is grown here."""

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from inference.generation import Generation

Child = tuple[int, int, Any]  # token, rank among its siblings, what the drafter needs to go on from it


@dataclass
class Draft:
    """A tree of guesses behind a text's last token, in the order in which they are worth it; parents come first.

    ``parents[i]`` is 0 for the text's own last token and ``j + 1`` for the draft's token ``j``. ``chances[i]`` is the
    estimated probability that token ``i`` and all above it are right; it never grows along the list.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)

    def first(self, count: int) -> "Draft":
        """The draft's most valuable tokens."""
        return Draft(self.tokens[:count], self.parents[:count], self.ranks[:count], self.chances[:count])

    def add(self, token: int, parent: int, rank: int, chance: float) -> None:
        """One more guess."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.ranks.append(rank)
        self.chances.append(chance)


class Source(Protocol):
    """Where guesses come from. What it remembers of a text, it gives to texts of the same tenant at most."""

    first_rates: Sequence[float]  # share of guesses of each rank that are right, until there is a record

    def draft(self, generation: Generation, rate: Callable[[int], float], most: int, depth: int) -> Draft:
        """At most ``most`` guesses; ``rate`` is the text's record by rank, ``depth`` what pays for a draft model."""
        ...

    def learn(self, generation: Generation, tokens: Sequence[int], path: Sequence[int], logits_RV: Tensor) -> None:
        """A verified pass: its tokens, which of them were right (row 0 among them), and all rows' logits."""
        ...

    def forget(self, generation: Generation) -> None:
        """The text has ended."""
        ...


class Successors(ABC):
    """A source that knows what may follow each token, and nothing of chances but its ranks."""

    @abstractmethod
    def root(self, generation: Generation) -> Any:
        """The state behind the text's last token; None: nothing to say."""

    @abstractmethod
    def children(self, state: Any) -> list[Child]:
        """Guesses of the token that follows, best first."""

    def draft(self, generation: Generation, rate: Callable[[int], float], most: int, depth: int) -> Draft:
        """The likeliest paths by the text's record."""
        state = self.root(generation)
        return Draft() if state is None else grow(self.children, state, rate, most)

    def learn(self, generation: Generation, tokens: Sequence[int], path: Sequence[int], logits_RV: Tensor) -> None:
        """Nothing, unless a source says otherwise: the text is read again."""
        return


def grow(children: Callable[[Any], list[Child]], state: Any, rate: Callable[[int], float], most: int) -> Draft:
    """The ``most`` guesses with the largest product of rates along their path, by a heap (DySpec, arXiv:2410.11744,
    algorithm 1, with rates in the place of a draft model's probabilities)."""
    draft = Draft()
    heap: list[tuple[float, int, int, Child]] = []

    def push(parent: int, chance: float, state: Any) -> None:
        for child in children(state):
            value = chance * rate(child[1])
            if value > 0:
                heapq.heappush(heap, (-value, len(heap) + 64 * len(draft.tokens), parent, child))

    push(0, 1.0, state)
    while heap and len(draft.tokens) < most:
        value, _, parent, (token, rank, below) = heapq.heappop(heap)
        draft.add(token, parent, rank, -value)
        push(len(draft.tokens), -value, below)
    return draft

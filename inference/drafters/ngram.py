"""The text's own continuation after the last place that ended as it does now (prompt lookup, as in LLMA,
arXiv:2304.04487): right where an output copies its input, and free where nothing matches."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

from inference.drafters.base import Child, Successors
from inference.generation import Generation

LONGEST, SHORTEST = 4, 2  # tokens at the end of a text that must occur before


class Lookup:
    """Where each run of tokens last occurred in one text."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # run -> place behind it
        self._seen = 0

    def place(self, tokens: Sequence[int]) -> int | None:
        """Where the text went on after the longest earlier run that equals the end of ``tokens``."""
        for end in range(max(self._seen, SHORTEST), len(tokens)):  # runs that something follows
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - size : end])] = end
        self._seen = len(tokens)
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            place = self._after.get(tuple(tokens[-size:]))
            if place is not None:
                return place
        return None


class Ngram(Successors):
    """One guess, from the text itself."""

    first_rates: Sequence[float] = (0.7,)

    def __init__(self) -> None:
        self._lookups: WeakKeyDictionary[Generation, Lookup] = WeakKeyDictionary()

    def root(self, generation: Generation) -> tuple[list[int], int] | None:
        lookup = self._lookups.setdefault(generation, Lookup())
        place = lookup.place(generation.tokens)
        return None if place is None else (generation.tokens, place)

    def children(self, state: tuple[list[int], int]) -> list[Child]:
        tokens, place = state
        return [(tokens[place], 0, (tokens, place + 1))] if place < len(tokens) else []

    def forget(self, generation: Generation) -> None:
        self._lookups.pop(generation, None)

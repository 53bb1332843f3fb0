"""Parts of shards in memory, and the sums that a rank holds for some owner while blocks and messages are added."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parallel.ring.problem import Segments

# How a sum's tensors [batch, tokens, heads, ...] take on others of the same tokens.
Add = Callable[[list[Tensor], list[Tensor]], None]


def spans(lengths: Sequence[int], held: Segments, wanted: Segments) -> list[tuple[int, int]]:
    """Where the tokens of ``wanted`` are in tensors that hold the segments ``held``: ``(first, count)``, neighbours
    joined. ``lengths`` has the tokens of every segment of the shard."""
    found: list[tuple[int, int]] = []
    remaining = iter(wanted)
    target = next(remaining, None)
    first = 0
    for segment in held:
        if segment == target:
            if found and sum(found[-1]) == first:
                found[-1] = (found[-1][0], found[-1][1] + lengths[segment])
            else:
                found.append((first, lengths[segment]))
            target = next(remaining, None)
        first += lengths[segment]
    assert target is None, f"segments {wanted} are not all among those at hand, {held}"
    return found


def select(tensors: list[Tensor], places: list[tuple[int, int]]) -> list[Tensor]:
    """The tokens at these places; views if they lie side by side."""
    if len(places) == 1:
        return [x.narrow(1, *places[0]) for x in tensors]
    return [torch.cat([x.narrow(1, *place) for place in places], 1) for x in tensors]


class Sum:
    """One running sum. It takes over the first tensors that it is given and grows when others reach further."""

    def __init__(
        self, lengths: Sequence[int], segments: Segments, tensors: list[Tensor], add: Add, empty: tuple[float, ...]
    ) -> None:
        self.segments, self.tensors = segments, tensors
        self._lengths, self._add, self._empty = lengths, add, empty

    def view(self, segments: Segments) -> list[Tensor] | None:
        """The part of the sum that holds these segments, to be added to in place; None if there is no such view."""
        if not set(segments) <= set(self.segments):
            return None
        places = spans(self._lengths, self.segments, segments)
        return select(self.tensors, places) if len(places) == 1 else None

    def add(self, segments: Segments, tensors: list[Tensor]) -> None:
        if not set(segments) <= set(self.segments):
            if set(self.segments) <= set(segments) and tensors[0].dtype == self.tensors[0].dtype:
                # What came in reaches further: add our smaller part to it.
                segments, self.segments = self.segments, segments
                tensors, self.tensors = self.tensors, tensors
            else:
                self._grow(tuple(sorted({*self.segments, *segments})))
        first = 0
        for place in spans(self._lengths, self.segments, segments):
            part = [x.narrow(1, first, place[1]) for x in tensors]
            self._add([x.narrow(1, *place) for x in self.tensors], part)
            first += place[1]

    def take(self, segments: Segments) -> list[Tensor]:
        """Take these segments out of the sum."""
        rest = tuple(segment for segment in self.segments if segment not in segments)
        taken = select(self.tensors, spans(self._lengths, self.segments, segments))
        if rest:
            self.tensors = select(self.tensors, spans(self._lengths, self.segments, rest))
        self.segments = rest
        return taken

    def _grow(self, segments: Segments) -> None:
        tokens = sum(self._lengths[segment] for segment in segments)
        grown = [
            x.new_full((x.shape[0], tokens, *x.shape[2:]), value)
            for x, value in zip(self.tensors, self._empty, strict=True)
        ]
        first = 0
        for start, count in spans(self._lengths, segments, self.segments):
            for whole, x in zip(grown, self.tensors, strict=True):
                whole.narrow(1, start, count).copy_(x.narrow(1, first, count))
            first += count
        self.segments, self.tensors = segments, grown


def add_plain(total: list[Tensor], part: list[Tensor]) -> None:
    """Gradients: a plain sum."""
    for x, y in zip(total, part, strict=True):
        x.add_(y)

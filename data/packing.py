"""Which documents, whole or in pieces, fill which window.

- ``concat`` (the paper): one document after another, cut wherever a window ends.
- ``soft``: a window ends with whole documents: of the last few that would fit and the next few, those that fill it best
  (a subset sum, exact), the others wait for the next one. A document of at least a quarter of the window may be cut
  instead, at a price. So documents under a quarter of the window are never cut. The prices are those, of a few, with
  which at most half as many documents are cut as by ``concat``, at most 1% is padded and the fewest places are moved.
- ``whole``: the same at one price, and no document is cut that fits in a window.

Images are never cut: a window ends before an image that it cannot hold, and is padded.

What a window costs is counted in places: each one that a document waits or comes early, padding and cuts. The order is
kept but for documents that overtake a few others. No token is lost or repeated.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

WAIT = 1.0  # places: a document's from the full place on, when it waits for the next window
QUARTER = 4  # share of a window from which on a document may be cut
PADDING, CUTS = 0.01, 0.5  # what soft packing allows: of the tokens; of the documents that ``concat`` cuts
NOBODY = -1
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Prices:
    """What decides the end of a window; prices are in places of the order."""

    back: int  # documents before and after the place where a window is full, among which its last are chosen
    ahead: int
    early: float  # for each place that a document comes early
    padded: float  # a whole window of padding
    cut: float = 0.0  # a document in one more piece than it must have

    def row(self) -> tuple[int, int, float, float, float]:
        return self.back, self.ahead, self.early, self.padded, self.cut


WHOLE = Prices(4, 12, 3.0, 4000.0)  # where cuts do not help against padding
SOFT = [
    Prices(back, 8, 5.0, padded, cut)
    for back, padded, cut in itertools.product((2, 4), (100.0, 200.0, 400.0, 800.0, 1600.0), (3.0, 5.0, 8.0, 13.0))
]


def plan(lengths: Ints, context: int, packing: str, images: tuple[Ints, Ints] | None = None) -> Ints:
    """Pieces int64 ``[pieces, 4]``: document, offset in it, tokens, window; by window, then by place in it.

    ``images``: where spans start and where they are over that are not cut, sorted, counted through all documents; each
    fits in a window.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    starts, ends = images if images is not None else (np.zeros(0, dtype=np.int64),) * 2
    assert len(starts) == 0 or (ends - starts).max() <= context, "a window holds every image whole"
    if packing == "concat":
        return _concat(lengths, context, starts, ends)
    if packing == "whole":
        return _plan(lengths, context, True, WHOLE.row(), starts, ends)
    return _soft(lengths, context, starts, ends)


def cut_documents(pieces: Ints, lengths: Ints, context: int) -> int:
    """Documents in more pieces than their length asks for."""
    return int((np.bincount(pieces[:, 0], minlength=len(lengths)) > -(-lengths // context)).sum())


def _soft(lengths: Ints, context: int, starts: Ints, ends: Ints) -> Ints:
    """The best plan of several: within the bounds on cuts and padding, else as near as any; then the fewest moves."""
    cuts = CUTS * cut_documents(_concat(lengths, context, starts, ends), lengths, context)
    least = -(-int(lengths.sum()) // context)
    windows = max(least, int(lengths.sum() / (1 - PADDING) / context))
    found, best = np.zeros((0, 4), dtype=np.int64), (np.inf, np.inf, np.inf)
    for prices in SOFT:
        pieces = _plan(lengths, context, False, prices.row(), starts, ends)
        over = cut_documents(pieces, lengths, context) - cuts, int(pieces[-1, 3]) + 1 - windows if len(pieces) else 0
        judged = max(0.0, over[0]), max(0, over[1]), _places_moved(pieces, len(lengths))
        if judged < best:
            found, best = pieces, judged
    return found


def _places_moved(pieces: Ints, documents: int) -> int:
    """How far documents lie from their place in the order, all together."""
    firsts = np.full(documents, len(pieces))
    np.minimum.at(firsts, pieces[:, 0], np.arange(len(pieces)))
    ranks = np.argsort(np.argsort(firsts, kind="stable"), kind="stable")
    return int(np.abs(ranks - np.arange(documents)).sum())


def _concat(lengths: Ints, context: int, starts: Ints, ends: Ints) -> Ints:
    documents_end = np.cumsum(lengths)
    windows = _window_starts(int(lengths.sum()), context, starts, ends)
    bounds = np.unique(np.concatenate([[0], documents_end, windows]))
    pieces = bounds[:-1]
    documents = np.searchsorted(documents_end, pieces, side="right")
    offsets = pieces - (documents_end - lengths)[documents]
    return np.stack([documents, offsets, np.diff(bounds), np.searchsorted(windows, pieces, side="right") - 1], axis=1)


@numba.njit(cache=True)
def _window_starts(tokens: int, context: int, starts: Ints, ends: Ints) -> Ints:
    """Where windows of documents without gaps begin."""
    found = np.empty(tokens // context + len(starts) + 1, dtype=np.int64)
    count, place = 0, 0
    while place < tokens:
        found[count] = place
        count, place = count + 1, _before_image(place + context, starts, ends)
    return found[:count]


@numba.njit(cache=True)
def _before_image(place: Any, starts: Ints, ends: Ints) -> Any:
    """``place``, or the start of the image that it is inside of."""
    image = np.searchsorted(starts, place) - 1  # the last that starts before it
    return starts[image] if image >= 0 and place < ends[image] else place


@numba.njit(cache=True)
def _plan(lengths: Ints, context: int, whole: bool, prices: Any, starts: Ints, ends: Ints) -> Ints:
    documents, count, window, room = len(lengths), 0, 0, context
    firsts = np.cumsum(lengths) - lengths  # of the documents, counted through all
    pieces = np.empty((documents * 2 + lengths.sum() // context + len(starts) + 2, 4), dtype=np.int64)
    after = np.arange(1, documents + 2)  # the next document that waits; the head is ``documents``
    after[documents] = 0
    cost, chosen = np.empty(context + 1), np.empty(context + 1, dtype=np.int64)
    back, ahead, early, padded, price = prices
    last, sizes = np.empty(back + ahead, dtype=np.int64), np.empty(back + ahead, dtype=np.int64)
    carried, offset = NOBODY, 0  # a document that has been cut, and how much of it is placed
    while carried != NOBODY or after[documents] < documents:
        if carried == NOBODY:
            fitting, used, document = 0, 0, after[documents]
            while document < documents and used + lengths[document] <= room:
                used, fitting, document = used + lengths[document], fitting + 1, after[document]
            for _ in range(fitting if document == documents else fitting - back):  # far from the window's end
                first = after[documents]
                count = _put(pieces, count, first, 0, lengths[first], window)
                room, after[documents] = room - lengths[first], after[first]
            if after[documents] == documents:
                break
            size, document = 0, after[documents]
            while document < documents and size < min(fitting, back) + ahead:
                last[size], sizes[size] = document, lengths[document]
                size, document = size + 1, after[document]
            near = min(fitting, back)
            mask, cut = _fill(sizes[:size], near, room, context, whole, early, padded, price, cost, chosen)
            before = documents
            for place in range(size):
                document = last[place]
                if mask >> place & 1:
                    count = _put(pieces, count, document, 0, lengths[document], window)
                    room -= lengths[document]
                if mask >> place & 1 or place == cut:
                    after[before] = after[document]
                else:
                    before = document
            if cut == NOBODY:
                window, room = window + 1, context
                continue
            carried, offset = last[cut], 0
        place = firsts[carried] + offset
        end = place + min(room, lengths[carried] - offset)
        take = _before_image(end, starts, ends) - place
        room = room if place + take == end else take  # what an image leaves free is padding
        count = _put(pieces, count, carried, offset, take, window)
        offset, room = offset + take, room - take
        if offset == lengths[carried]:
            carried = NOBODY
        if room == 0:
            window, room = window + 1, context
    return pieces[:count]


@numba.njit(cache=True)
def _put(pieces: Ints, count: int, document: int, offset: int, tokens: Any, window: int) -> int:
    if tokens > 0:
        pieces[count] = (document, offset, tokens, window)
        count += 1
    return count


@numba.njit(cache=True)
def _fill(
    sizes: Ints,
    fitting: int,
    room: int,
    context: int,
    whole: bool,
    early: float,
    padded: float,
    needless: float,
    cost: npt.NDArray[np.float64],
    chosen: Ints,
) -> tuple[Any, int]:
    """The cheapest end of a window with ``room`` left: bits of those documents that go in, and which one is cut.

    The first ``fitting`` would all fit; ``needless`` is the price of a cut that makes one piece more. ``cost`` and
    ``chosen`` ``[context + 1]`` are scratch: the cheapest subset of every sum of tokens.
    """
    cost[: room + 1] = np.inf
    cost[0], chosen[0], reached = WAIT * fitting * (fitting + 1) / 2, 0, 0  # of all that wait
    for place in range(len(sizes)):
        size = sizes[place]
        reached = min(room, reached + size) if size <= room else reached
        for total in range(reached, size - 1, -1):
            price = cost[total - size] + _price(place, fitting, early)
            if price < cost[total]:
                cost[total], chosen[total] = price, chosen[total - size] | (1 << place)
    best, mask, cut = np.inf, np.int64(0), NOBODY
    for total in range(reached + 1):
        left = room - total
        price = cost[total] + padded * left / context
        if price < best:
            best, mask, cut = price, chosen[total], NOBODY
        for place in range(len(sizes)):
            size = sizes[place]
            if 0 < left < size and not chosen[total] >> place & 1:
                spare = 1 + -(-(size - left) // context) == -(-size // context)  # no more pieces than it must have
                price = cost[total] + _price(place, fitting, early) + (0.0 if spare else needless)
                if price < best and (spare or (not whole and size * QUARTER >= context)):
                    best, mask, cut = price, chosen[total], place
    return mask, cut


@numba.njit(cache=True)
def _price(place: int, fitting: int, early: float) -> float:
    """What it costs to take a document: less than nothing where it would fit, as then it need not wait."""
    return -WAIT * (fitting - place) if place < fitting else early * (place - fitting + 1)

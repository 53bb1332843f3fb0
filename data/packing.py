"""Which documents, whole or in pieces, fill which window.

- ``concat`` (the paper): one document after another, cut wherever a window ends.
- ``soft``: a document goes where it is whole. Where the next does not fit, one of the following that does goes first;
  where there is none, a document of at least a quarter of the window is cut. So documents under a quarter of the
  window are never cut, and little is padded.
- ``whole``: no document is cut that fits in a window.

The order is kept but for documents that overtake a few others. No token is lost or repeated.
"""

import numba
import numpy as np
import numpy.typing as npt

NEAR = 8  # documents ahead among which the longest that fits is looked for where the next one does not fit
FAR = 512  # among so many, unless little room is left, where none of the near ones fits and none may be cut
PADDED = 64  # share of a window that is rather padded than filled from far ahead or by a cut
QUARTER = 4  # share of a window from which on a document may be cut
Ints = npt.NDArray[np.int64]


def plan(lengths: Ints, context: int, packing: str) -> Ints:
    """Pieces int64 ``[pieces, 4]``: document, offset in it, tokens, window; by window, then by place in it."""
    return _plan(np.asarray(lengths, dtype=np.int64), context, packing == "concat", packing == "whole")


@numba.njit(cache=True)
def _plan(lengths: Ints, context: int, concat: bool, whole: bool) -> Ints:
    documents = len(lengths)
    pieces = np.empty((documents * 2 + lengths.sum() // context + 2, 4), dtype=np.int64)
    count, window, room, first = 0, 0, context, 0
    placed = np.zeros(documents, dtype=np.bool_)
    carried, offset = -1, 0  # a document that has been cut, and how much of it is placed
    while True:
        while first < documents and placed[first]:
            first += 1
        if carried >= 0:
            chosen = carried
        elif first == documents:
            break
        else:
            chosen, offset = _choose(lengths, placed, first, room, context, concat, whole), 0
        if chosen < 0:
            window, room = window + 1, context
            continue
        take = min(room, lengths[chosen] - offset)
        if take > 0:
            pieces[count] = (chosen, offset, take, window)
            count += 1
        placed[chosen], offset, room = True, offset + take, room - take
        carried = chosen if offset < lengths[chosen] else -1
        if room == 0:
            window, room = window + 1, context
    return pieces[:count]


@numba.njit(cache=True)
def _choose(
    lengths: Ints, placed: npt.NDArray[np.bool_], first: int, room: int, context: int, concat: bool, whole: bool
) -> int:
    """The next document of a window with ``room`` left; -1: none, the rest is padding."""
    if concat:
        return first
    cut, fits, seen = -1, -1, 0
    for document in range(first, len(lengths)):
        if placed[document]:
            continue
        seen += 1
        length = lengths[document]
        if length <= room or (length > context and 1 - (room - length) // context <= -(-length // context)):
            if seen == 1 or seen > NEAR:
                return document  # it fits, or is in no more pieces than it has to be
            if fits < 0 or length > lengths[fits]:
                fits = document
        if cut < 0 and not whole and length * QUARTER >= context:
            cut = document
        if seen >= NEAR and fits >= 0:
            return fits
        if seen == NEAR and room * PADDED <= context:
            return -1
        if seen >= (NEAR if cut >= 0 else FAR):
            break
    return fits if fits >= 0 else cut

"""Needles and threads: what a model finds in a long context (Needle Threading, arXiv:2411.05000, section 3).

Everything is synthetic. A haystack is a run of words with pairs of a key and its value strewn into it; the question at
its end names a key. A thread is followed from key to value, where the value is the next pair's key; it runs forward or
backward through the context.
"""

import itertools
import random
from collections.abc import Sequence

WORDS = tuple(a + b + c + d for a in "bdfgklnz" for b in "aeiou" for c in "lmr" for d in "aei")[:256]
FILLER = (
    "the",
    "sun",
    "rose",
    "over",
    "a",
    "quiet",
    "field",
    "and",
    "wind",
    "moved",
    "slowly",
    "through",
    "grass",
    ".",
)


def haystack(
    generator: random.Random, tokens: int, pairs: int, thread: Sequence[str] = (), forward: bool = True
) -> tuple[list[str], dict[str, str]]:
    """``tokens`` words with ``pairs`` of ``key value`` in them, and what each key stands for.

    The pairs that chain the words of ``thread`` are among them, in order along the text or against it.
    """
    free = [word for word in WORDS if word not in thread]
    keys = generator.sample(free, pairs)
    values = sorted(set(free) - set(keys))
    others = [(key, generator.choice(values)) for key in keys]
    chain = list(itertools.pairwise(thread))
    places = sorted(generator.sample(range(len(others) + len(chain)), len(chain)))
    entries = others[:]
    for place, link in zip(places, chain if forward else chain[::-1], strict=True):
        entries.insert(place, link)
    gaps = tokens - 2 * len(entries)
    assert gaps >= 0, "more pairs than fit"
    cuts = sorted(generator.choices(range(gaps + 1), k=len(entries)))
    words: list[str] = []
    filled = 0
    for cut, (key, value) in zip(cuts, entries, strict=True):
        words += [FILLER[place % len(FILLER)] for place in range(filled, cut)]
        words += [key, value]
        filled = cut
    words += [FILLER[place % len(FILLER)] for place in range(filled, gaps)]
    return words, dict(entries)

"""Needles and threads: what a model finds in a long context (Needle Threading, arXiv:2411.05000, section 3).

Everything is synthetic. A haystack is a run of words with pairs of a key and its value strewn into it; the question at
its end names a key. A thread is followed from key to value, where the value is the next pair's key; it runs forward or
backward through the context.
"""

import itertools
import random
from collections.abc import Sequence

from conf.evaluate import EvaluateConfig
from inference.engine import Engine
from inference.methods import Methods
from inference.params import SamplingParams

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
    generator: random.Random,
    tokens: int,
    pairs: int,
    links: Sequence[tuple[str, str]] = (),
    forward: bool = True,
) -> tuple[list[str], dict[str, str]]:
    """``tokens`` words with ``pairs`` of ``key value`` in them, and what each key stands for.

    ``links`` are further pairs, strewn in as they are or, not ``forward``, in reverse.
    """
    taken = {word for link in links for word in link}
    free = [word for word in WORDS if word not in taken]
    keys = generator.sample(free, pairs)
    values = sorted(set(free) - set(keys))
    others = [(key, generator.choice(values)) for key in keys]
    places = sorted(generator.sample(range(len(others) + len(links)), len(links)))
    entries = others[:]
    for place, link in zip(places, links if forward else links[::-1], strict=True):
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


def question(generator: random.Random, length: int, pairs: int, hops: int, forward: bool) -> tuple[str, list[str]]:
    """A haystack with three threads of ``hops`` links and a question; the first two are answered, to show the form.
    Returns the prompt and the words of the third thread behind its key."""
    words, known = haystack(generator, length, pairs)
    if hops == 1:
        threads = [[key, known[key]] for key in generator.sample(sorted(known), 3)]
    else:
        chosen = generator.sample(WORDS, 3 * (hops + 1))
        threads = [chosen[index::3] for index in range(3)]
        links = [pair for thread in threads for pair in itertools.pairwise(thread)]
        words, _ = haystack(generator, length, pairs, links, forward)
    shown = [word for thread in threads[:2] for word in ("?", *thread)]
    return " " + " ".join([*words, *shown, "?", threads[2][0]]), threads[2][1:]


def measure(engine: Engine, config: EvaluateConfig, task: str, methods: Methods) -> dict[str, float]:
    """Share of the questions whose last word is found, by length of the haystack; greedy."""
    hops = 1 if task == "needle" else config.hops
    found = {}
    for length in config.lengths:
        generator, right = random.Random(f"{config.seed} {task} {length}"), 0
        for _ in range(config.samples):
            prompt, answer = question(generator, length, config.pairs, hops, task != "thread_backward")
            params = SamplingParams(max_tokens=6 * hops, temperature=0.0, ignore_eos=True, methods=methods)
            text = "".join(step.text for step in engine.stream(engine.encode(prompt), params))
            right += text.split()[hops - 1 : hops] == answer[-1:]
        found[f"{length}"] = right / config.samples
    return found

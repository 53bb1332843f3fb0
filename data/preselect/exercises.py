"""A small evaluation without downloads, and documents that teach what it asks.

Four kinds of multiple choice: invented facts, sums, copies and look-ups in the text. An item is four texts that differ
in their end; a model answers with the text of least loss, so chance is 0.25 and no text is generated. Facts are asked
in the words that documents use; sums are asked of pairs of numbers that no document holds. It measures whether a small
model has learnt what such documents teach, and nothing else: for models of real use give abilities in the ladder's
table.
"""

import random
from collections.abc import Callable
from typing import Any

CHOICES = 4
SYLLABLES = ("ar", "bel", "cor", "dun", "el", "fen", "gar", "hol", "ir", "kel", "lom", "mir", "nor", "or", "pel", "tam")
THINGS = ("mill", "barn", "tower", "bridge", "well", "gate", "mine", "ship", "house", "school", "market", "garden")
WORDS = ("stone", "river", "cloud", "apple", "silver", "winter", "garden", "copper", "forest", "lantern", "marble")
LARGEST = 10
Item = tuple[str, list[str]]  # prompt, choices; the first is right


def _name(draw: random.Random) -> str:
    return "".join(draw.sample(SYLLABLES, 2)).capitalize()


def facts(count: int = 24) -> dict[str, str]:
    """Towns and their rivers: the same in every call."""
    draw = random.Random("rivers")
    towns: dict[str, str] = {}
    while len(towns) < count:
        towns.setdefault(_name(draw) + "ton", _name(draw) + "a")
    return towns


def held_out(a: int, b: int) -> bool:
    """Whether a sum is asked and never taught."""
    return random.Random(a * 1000 + b).random() < 0.25


def _fact(draw: random.Random) -> Item:
    towns = facts()
    town = draw.choice(sorted(towns))
    wrong = sorted(set(towns.values()) - {towns[town]})
    return f"The river of {town} is the ", [f"{river}." for river in [towns[town], *draw.sample(wrong, CHOICES - 1)]]


def _sum(draw: random.Random, asked: bool = True) -> Item:
    while True:
        a, b = draw.randint(1, LARGEST), draw.randint(1, LARGEST)
        if held_out(a, b) == asked:
            break
    near = sorted({a + b + step for step in (-10, -2, -1, 1, 2, 10)} - {a + b})
    return f"{a} plus {b} is ", [f"{n}." for n in [a + b, *draw.sample([n for n in near if n > 0], CHOICES - 1)]]


def _copy(draw: random.Random) -> Item:
    words = draw.sample(WORDS, 5)
    others = draw.sample([w for w in WORDS if w not in words], CHOICES - 1)
    return f"Say {' '.join(words)}. Again: {' '.join(words[:4])} ", [f"{w}." for w in [words[4], *others]]


def _recall(draw: random.Random) -> Item:
    things, keys = draw.sample(THINGS, CHOICES), [str(n) for n in draw.sample(range(10, 100), CHOICES)]
    told = " ".join(f"The key of the {thing} is {key}." for thing, key in zip(things, keys, strict=True))
    asked = draw.randrange(CHOICES)
    answers = [keys[asked], *(key for key in keys if key != keys[asked])]
    return f"{told} The key of the {things[asked]} is ", [f"{key}." for key in answers]


KINDS: dict[str, Callable[[random.Random], Item]] = {"facts": _fact, "sums": _sum, "copies": _copy, "look-ups": _recall}


def items(count: int, seed: int) -> dict[str, list[Item]]:
    """``count`` items of each kind."""
    drawn = {kind: random.Random(f"{kind} {seed}") for kind in KINDS}
    return {kind: [make(drawn[kind]) for _ in range(count)] for kind, make in KINDS.items()}


def item_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """The texts of the items, CHOICES rows each, the right one first, as rows of a sample."""
    return [
        {"id": f"{kind}/{number}/{place}", "text": prompt + choice, "source": "items", "domain": kind}
        for kind, found in items(count, seed).items()
        for number, (prompt, choices) in enumerate(found)
        for place, choice in enumerate(choices)
    ]


def teaching_document(number: int, seed: int, lines: int = 12) -> str:
    """A document of worked exercises; held-out sums do not occur."""
    draw = random.Random(f"teach {seed} {number}")
    makers = [_fact, lambda d: _sum(d, asked=False), _copy, _recall]
    worked = (draw.choice(makers)(draw) for _ in range(lines))
    return "\n".join(prompt + choices[0] for prompt, choices in worked)

import random

import pytest

from inference.drafting import LONGEST, SHORTEST, DraftSize, Lookup


def slow_continuation(tokens: list[int], most: int) -> list[int]:
    for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return tokens[end : end + most]
    return []


@pytest.mark.parametrize("seed", range(5))
def test_the_text_goes_on_as_after_the_last_place_that_ended_alike(seed: int):
    generator = random.Random(seed)
    tokens = [generator.randrange(4) for _ in range(3)]
    lookup = Lookup()
    for _ in range(120):
        assert lookup.continuation(tokens, 5) == slow_continuation(tokens, 5)
        tokens += [generator.randrange(4) for _ in range(generator.randrange(1, 4))]


def test_a_draft_is_as_long_as_pays():
    flat = DraftSize(dict.fromkeys(range(1, 13), 1.0), 8)
    assert flat.best(0.9, 1) == flat.best(0.01, 1) == 8  # rows that cost nothing are always worth it
    linear = DraftSize({rows: float(rows) for rows in range(1, 13)}, 8)
    assert linear.best(0.99, 1) == 0
    cliff = DraftSize({rows: 1.0 + 0.1 * rows + 10.0 * (rows > 3) for rows in range(1, 13)}, 8)
    assert cliff.best(0.9, 1) == 2
    assert cliff.best(0.05, 1) == 0
    assert cliff.best(0.9, 3) == 0

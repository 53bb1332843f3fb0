import math
from itertools import pairwise

import pytest

from conf.schema import TrainerConfig
from trainers.schedule import learning_rate


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    trainer = TrainerConfig(steps=100, warmup_steps=10, lr=2.0)
    assert [learning_rate(step, trainer) for step in range(10)] == pytest.approx([0.2 * k for k in range(1, 11)])


def test_cosine_ends_at_the_floor_on_the_last_step_and_stays_there() -> None:
    trainer = TrainerConfig(steps=100, warmup_steps=10, lr=2.0, min_lr_fraction=0.1)
    assert learning_rate(99, trainer) == pytest.approx(0.2)
    assert learning_rate(5000, trainer) == pytest.approx(0.2)
    middle = 2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert learning_rate(54, trainer) == pytest.approx(middle)


def test_falls_monotonically_after_warmup() -> None:
    trainer = TrainerConfig(steps=50, warmup_steps=5)
    rates = [learning_rate(step, trainer) for step in range(4, 50)]
    assert all(a > b for a, b in pairwise(rates))


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5)])
def test_short_runs_are_defined(steps: int, warmup: int) -> None:
    trainer = TrainerConfig(steps=steps, warmup_steps=warmup, lr=1.0)
    assert all(0 < learning_rate(step, trainer) <= 1.0 for step in range(steps + 2))

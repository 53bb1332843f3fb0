"""Prompts beside running texts take the time that these are willing to give."""

from dataclasses import replace
from pathlib import Path

import pytest

from conf.errors import ConfigError
from conf.serving import EngineConfig
from inference.engine import Engine
from inference.pace import FIRST, FRESH, LEAST, Pace
from inference.params import SamplingParams


def settled(row_sec: float, plain_sec: float = 0.010) -> Pace:
    """A pace that has seen enough passes on a machine of these times."""
    pace = Pace(64, 1.5)
    for _ in range(FRESH):
        rows = pace.rows(4)
        pace.saw(4, rows, plain_sec + rows * row_sec)
    return pace


def test_rows_are_as_many_as_the_slowdown_allows():
    assert settled(row_sec=0.00025).rows(4) == pytest.approx(20, abs=1)
    assert settled(row_sec=0.005).rows(4) == LEAST
    assert settled(row_sec=0.0).rows(4) == 64


def test_texts_are_measured_alone_first_and_now_and_then():
    pace = Pace(64, 1.5)
    assert pace.rows(2) == 0
    pace.saw(2, 0, 0.01)
    assert pace.rows(2) == FIRST
    assert pace.rows(3) == 0, "three texts have not been measured"
    for _ in range(FRESH):
        pace.saw(2, 16, 0.012)
    assert pace.rows(2) == 0


def test_a_growing_past_makes_fewer_rows():
    pace, found = settled(row_sec=0.00025), []
    for step in range(30):
        found.append(pace.rows(4))
        pace.saw(4, found[-1], 0.010 + found[-1] * 0.00025 * (1 + step / 10))
        pace.saw(4, 0, 0.010)
    assert found[-1] < found[0] / 2


def test_no_slowdown_means_a_fixed_number():
    assert Pace(48, 0.0).rows(3) == 48


def test_a_prompt_is_computed_beside_texts_that_run(model_folder: Path):
    engine = Engine(model_folder, EngineConfig(page_tokens=4, prefix_cache=False))
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    texts = [engine.start(engine.encode(text), params) for text in ("the cat", "a dog sat on the mat " * 8)]
    engine.submit(texts[0])
    for _ in range(4):
        engine.step()
    engine.submit(texts[1])
    while engine.busy:
        engine.step()
    alone = Engine(model_folder, replace(engine.settings, mixed_slowdown=0.0))
    for text in texts:
        prompt = text.tokens[: text.prompt_tokens]
        assert [step.token for step in alone.stream(prompt, params)] == text.tokens[text.prompt_tokens :]


def test_a_slowdown_below_one_is_refused(model_folder: Path):
    with pytest.raises(ConfigError, match="mixed_slowdown"):
        Engine(model_folder, EngineConfig(mixed_slowdown=0.5))

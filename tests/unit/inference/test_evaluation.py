import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import needle_model
from conf.errors import ConfigError, DataError
from conf.evaluate import EvaluateConfig, check_evaluation
from conf.serving import EngineConfig
from inference.evaluation import TASKS, automata, evaluate
from inference.evaluation.needles import haystack, question
from launch.__main__ import main
from models.hf import load_hf
from tests.unit.inference.builders import TEXT


@pytest.fixture(scope="module")
def finder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return needle_model.write(tmp_path_factory.mktemp("finder") / "model")


def settings(folder: Path, **changes) -> EvaluateConfig:
    engine = EngineConfig(pack=False, kv_tokens=2048)
    return EvaluateConfig(str(folder), "", ["needle"], [200], 4, strings=6, engine=engine, **changes)


@pytest.mark.parametrize("seed", range(3))
def test_a_haystack_has_its_length_and_every_pair_once(seed: int):
    generator = random.Random(seed)
    links = [("bala", "bela"), ("bela", "nire")]
    for forward in (True, False):
        words, known = haystack(generator, 150, 20, links, forward)
        assert len(words) == 150
        assert len(known) == 22
        assert all(words[words.index(key) + 1] == value for key, value in known.items() if key != "bela")
        places = [words.index("bala"), len(words) - 1 - words[::-1].index("nire")]
        assert (places == sorted(places)) == forward


def test_a_threads_answer_follows_its_links():
    prompt, answer = question(random.Random(1), 300, 20, 3, True)
    words = prompt.split()
    key = words[-1]
    pairs = list(itertools.pairwise(words))
    for value in answer:
        assert (key, value) in pairs
        key = value
    assert len(answer) == 3


def test_what_an_automaton_allows_is_where_its_walk_could_go():
    generator = random.Random(0)
    automaton = automata.draw(generator, list("abcdefgh"))
    for _ in range(20):
        walked, allowed = automata.string(generator, automaton)
        state = 0
        for symbol, possible in zip(walked, allowed, strict=True):
            assert symbol in possible == set(automaton[state])
            state = automaton[state][symbol]


def test_a_model_that_finds_needles_is_told_from_what_loses_them(finder: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 3)
    lines: list[str] = []
    config = replace(
        settings(finder, text=str(text), window=64, windows=2, policies=["sinks_recency:0.3"]), tasks=list(TASKS)
    )
    results = evaluate(config, lines.append)
    assert len(lines) == 2 * len(TASKS)
    assert results["full"]["needle"] == {"200": 1.0}
    assert results["sinks_recency:0.3"]["needle"]["200"] < 1.0
    assert results["full"]["automata"]["accuracy"] > results["full"]["automata"]["chance"] + 0.2
    assert results["full"]["perplexity"] == results["sinks_recency:0.3"]["perplexity"]  # as short as is always kept


def test_the_loss_is_that_of_the_models_own_forward(finder: Path, tmp_path: Path):
    text = tmp_path / "text.txt"
    text.write_text(" the sun rose over a quiet field and wind moved slowly" * 3)
    config = replace(settings(finder, text=str(text), window=20, windows=1), tasks=["perplexity"])
    found = evaluate(config, lambda _: None)["full"]["perplexity"]["all"]
    model, tokenizer = load_hf(finder).eval(), needle_model.load_tokenizer(finder)
    tokens = torch.tensor([tokenizer.encode(text.read_text())[:20]])
    with torch.no_grad():
        total, count = model.loss(tokens[:, :-1], tokens[:, 1:], torch.arange(19)[None])
    assert found == pytest.approx(float(total / count), rel=1e-4)


def test_the_command_writes_its_figures(finder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    output = tmp_path / "found.json"
    overrides = ["evaluate.samples=1", "evaluate.lengths=[120]", "evaluate.tasks=[needle]"]
    assert main(["evaluate", f"evaluate.model={finder}", f"evaluate.output={output}", *overrides]) == 0
    assert json.loads(output.read_text())["results"]["full"]["needle"] == {"120": 1.0}
    assert main(["evaluate", f"evaluate.model={finder}", "evaluate.tasks=[noodle]"]) == 2
    assert "noodle" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes", [{"tasks": ["perplexity"]}, {"lengths": [30]}, {"pairs": 300, "lengths": [2000]}, {"samples": 0}]
)
def test_what_cannot_be_measured_is_refused(changes: dict, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"evaluate\."):
        check_evaluation(replace(settings(tmp_path), **changes))


def test_a_text_that_is_missing_or_a_policy_that_is_wrong_is_named(finder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"evaluate\.text"):
        evaluate(replace(settings(finder, text=str(tmp_path / "no")), tasks=["perplexity"]), print)
    with pytest.raises(ConfigError, match="h2o"):
        evaluate(settings(finder, policies=["h2o"]), print)

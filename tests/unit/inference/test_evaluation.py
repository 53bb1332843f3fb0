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
from tests.helpers import wandb_file
from tests.unit.inference.builders import TEXT
from trainers.report import write_report


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
    tasks = [task for task in TASKS if task != "harness"]
    config = replace(
        settings(finder, text=str(text), window=64, windows=2, policies=["sinks_recency:0.3"]), tasks=tasks
    )
    results = evaluate(config, lines.append)
    assert len(lines) == 2 * len(tasks)
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


def test_figures_reach_wandb_and_the_report(finder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    run = f"run_dir={tmp_path}"
    overrides = [
        run,
        "tracker.wandb=offline",
        "evaluate.samples=1",
        "evaluate.lengths=[120]",
        "evaluate.tasks=[needle]",
    ]
    assert main(["evaluate", f"evaluate.model={finder}", *overrides, "evaluate.policies=[minference:0.5]"]) == 0
    wandb.teardown()  # its service writes the last records when it ends
    told = {
        item.key or "/".join(item.nested_key): item.value_json
        for record in wandb_file.records(tmp_path)
        if record.HasField("summary")
        for item in record.summary.update
    }
    assert float(told["evaluate/full/needle/120"]) == 1.0
    assert "evaluate/minference:0.5/needle/120" in told
    step = {"step": 1, "time": 0.0, "train/loss": 5.0, "train/tokens": 9.0, "optim/lr": 1e-3, "optim/grad_norm": 1.0}
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({**step, "throughput/tokens_per_sec": 9.0, "time/step_sec": 1.0, "memory/peak_gb": 1.0}) + "\n"
    )
    assert "minference:0.5" in write_report(tmp_path).read_text()


HARNESS = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: "{{right}}"
metric_list: [{metric: acc}]
"""
WRITTEN = """output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {max_gen_toks: 1}
metric_list: [{metric: exact_match}]
filter_list: [{name: none, filter: [{function: remove_whitespace}, {function: take_first}]}]
"""


def test_tasks_of_the_harness_are_judged_by_the_engine(finder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    generator, lines = random.Random(3), []
    for index in range(4):
        prompt, answer = question(generator, 160, 20, 1, True)
        other = "bala" if answer[0] != "bala" else "bela"
        choices = [answer[0], other] if index % 2 else [other, answer[0]]
        entry = {"text": prompt, "choices": choices, "right": choices.index(answer[0]), "answer": answer[0]}
        lines.append(json.dumps(entry))
    data, folder = tmp_path / "data.jsonl", tmp_path / "tasks"
    data.write_text("\n".join(lines) + "\n")
    folder.mkdir()
    for name, rest in (("choose", CHOICE), ("write", WRITTEN)):
        (folder / f"{name}.yaml").write_text(HARNESS.format(name=name, data=data) + rest)
    config = replace(settings(finder, harness=str(folder), policies=["sinks_recency:0.3"]), tasks=["harness"])
    results = evaluate(config, lambda _: None)
    assert results["full"]["harness"] == {"choose/acc": 1.0, "write/exact_match": 1.0}
    assert results["sinks_recency:0.3"]["harness"]["write/exact_match"] < 1.0
    with pytest.raises(DataError, match=r"evaluate\.harness"):
        evaluate(replace(config, harness=str(tmp_path / "none")), print)


@pytest.mark.parametrize(
    "changes",
    [
        {"tasks": ["perplexity"]},
        {"tasks": ["harness"]},
        {"lengths": [30]},
        {"pairs": 300, "lengths": [2000]},
        {"samples": 0},
    ],
)
def test_what_cannot_be_measured_is_refused(changes: dict, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"evaluate\."):
        check_evaluation(replace(settings(tmp_path), **changes))


def test_a_text_that_is_missing_or_a_policy_that_is_wrong_is_named(finder: Path, tmp_path: Path):
    with pytest.raises(DataError, match=r"evaluate\.text"):
        evaluate(replace(settings(finder, text=str(tmp_path / "no")), tasks=["perplexity"]), print)
    with pytest.raises(ConfigError, match="h2o"):
        evaluate(settings(finder, policies=["h2o"]), print)

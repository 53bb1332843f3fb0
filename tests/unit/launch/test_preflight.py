"""Overrides: every mistake exits with 2 and names field, value, rule, fix and the nearest real key."""

import itertools
from pathlib import Path

import pytest

from conf.describe import keys
from conf.errors import ConfigError
from conf.schema import GROUPS, OVERLAYS, RunConfig
from launch.__main__ import main
from launch.preflight import dump, load_config, options
from trainers.pretrain import load_config as load_saved


@pytest.mark.parametrize(
    ("argument", "field", "said"),
    [
        ("trainer.learnin_rate=3e-4", "trainer.learnin_rate", "unknown key"),
        ("+trainer.stepz=3", "trainer.stepz", "did you mean trainer.steps"),
        ("trainer.stepz=3", "trainer.stepz", "did you mean trainer.steps"),
        ("++trainer.stepz=3", "trainer.stepz", "did you mean trainer.steps"),
        ("lr=3", "lr", "did you mean trainer.lr"),
        ("sed=1", "sed", "did you mean seed"),
        ("+trainer.lr=3", "trainer.lr", "trainer.lr=3"),
        ("~trainer.lr", "trainer.lr", "cannot be removed"),
        ("trainer.lr=1,2", "trainer.lr", "one command is one run"),
        ("sequence=ring,token_ring", "sequence", "one command is one run"),
        ("trainer.lr=fast", "trainer.lr", "a number"),
        ("trainer.steps=2.5", "trainer.steps", "a whole number"),
        ("trainer.steps=true", "trainer.steps", "a whole number"),
        ("seed=null", "seed", "a whole number"),
        ("model.tie_embeddings=3", "model.tie_embeddings", "true or false"),
        ("tracker.tags=x", "tracker.tags", "a list"),
        ("sequence=tokenring", "sequence", "did you mean token_ring"),
        ("model=null", "model", "one of"),
        ("experiment=demoo", "experiment", "did you mean demo"),
        ("sequence.strategy=rign", "sequence.strategy", "did you mean ring"),
        ("trainer={lr:1}", "trainer", "one of"),
        ("data.path=[1", "data.path", "quote it"),
        ("steps", "argument", "KEY=VALUE"),
    ],
)
def test_mistake_is_answered(argument: str, field: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config([argument])
    error = raised.value
    assert error.field == field
    assert said in str(error)
    assert error.rule
    assert error.exit_code == 2


def test_overrides_reach_the_config() -> None:
    config = load_config(["name=x", "trainer.lr=1e-4", "sequence=ring", "tracker.tags=[a,b]", "cluster.ranks=4"])
    assert config.run_dir == "runs/x"
    assert config.export.dir == config.generate.model == config.serve.model == "runs/x/hf"
    assert (config.trainer.lr, config.sequence.strategy, config.tracker.tags) == (1e-4, "ring", ["a", "b"])


def test_later_overrides_win_over_the_experiment() -> None:
    config = load_config(["trainer.steps=7", "trainer.warmup_steps=1"], experiment="demo")
    assert config.name == "demo"
    assert config.trainer.steps == 7
    assert load_config(["experiment=null"], experiment="demo").name == "run"


@pytest.mark.parametrize(
    "argument", [f"{group}={option}" for group in (*GROUPS, *OVERLAYS) for option in options(group)]
)
def test_every_option_composes(argument: str) -> None:
    extra = {"data=path": ["data.path=x"], "debug=fast": ["name=d"]}.get(argument, [])
    if argument.startswith("experts=moe_"):
        extra = ["model=moma_90m"]  # groups of experts need a model of as many modalities
    if argument.endswith("_depth"):
        extra = ["sequence=local"]
    load_config([argument, *extra])


@pytest.mark.parametrize(
    "pair", list(itertools.product(options("sharding"), options("sequence"), options("order"))), ids="-".join
)
def test_main_decisions_combine(pair: tuple[str, str, str]) -> None:
    sharding, sequence, order = pair
    load_config([f"sharding={sharding}", f"sequence={sequence}", f"order={order}", "cluster.ranks=4"])


def test_saved_config_round_trips(tmp_path: Path) -> None:
    config = load_config(["experiment=demo", "trainer.steps=33"])
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load_saved(path) == config


@pytest.mark.parametrize("text", ["trainer: [", "trainer: {stepz: 1}", "trainer: {steps: many}"])
def test_damaged_saved_config_is_a_config_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_saved(path)
    with pytest.raises(ConfigError):
        load_saved(tmp_path / "none" / "config.yaml")


def test_help_covers_the_whole_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name}=" in text for name in keys())
    assert isinstance(RunConfig(), RunConfig)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "usage"),
        (["--help"], 0, "usage"),
        (["trian"], 2, "did you mean train"),
        (["train", "trainer.stepz=1"], 2, "trainer.steps"),
        (["report"], 2, "sundog report runs/NAME"),
        (["report", "/no/such"], 2, "metrics.jsonl"),
        (["submit", "trian"], 2, "did you mean train"),
        (["submit"], 2, "one of"),
        (["generate", "--prompt", "x", "generat.seed=1"], 2, "generate.seed"),
        (["serve", "serve.model=/no/such"], 2, "serve.model"),
    ],
)
def test_usage_mistakes_exit_with_2(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert said in captured.out + captured.err
    assert "Traceback" not in captured.err

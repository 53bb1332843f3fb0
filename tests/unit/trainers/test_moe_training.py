"""Runs of models with experts: metrics, resuming, upcycling, auxiliary routers, export."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from conf.errors import ConfigError
from conf.rules import check
from conf.schema import ExpertsConfig, RunConfig
from models.hf import load_hf
from tests.distributed.training_runs import Recorder, curve, make_config, make_data
from trainers.export import export
from trainers.pretrain import run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe")
    make_data(make_config(folder, "data"))
    return folder


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    assert not dist.is_initialized(), "run leaves its process group"


def moe_config(root: Path, name: str, groups: list[int], depth: float = 1.0, **changes: Any) -> RunConfig:
    """The last sixty ids, merges of the tokenizer, stand for images."""
    config = make_config(root, name, trainer__checkpoint_every=4, **{"trainer__steps": 12, **changes})
    config.model.modalities, config.model.modality_tokens = ["text", "image"], [60]
    config.model.experts, config.model.depth = ExpertsConfig(groups=groups, noise=True), depth
    return config


@pytest.fixture(scope="module")
def seed_run(root: Path) -> RunConfig:
    """One expert a modality, trained and exported."""
    config = moe_config(root, "seed", [1, 1])
    run(config, Recorder())
    export(config)
    return config


@pytest.fixture(scope="module")
def sparse_run(root: Path) -> tuple[RunConfig, dict[str, Any]]:
    config = moe_config(root, "sparse", [4, 4], depth=0.5)
    result = run(config, Recorder())
    export(config)
    return config, result


def test_experts_learn_and_say_what_they_do(sparse_run: tuple[RunConfig, dict[str, Any]]) -> None:
    config, result = sparse_run
    assert result["loss"] < curve(config)[0] - 0.5
    for name in ("text", "image"):
        assert curve(config, f"moe/load_imbalance/{name}")[-1] == pytest.approx(1.0), "expert choice is balanced"
        parts = [curve(config, f"moe/tokens_with_{n}/{name}")[-1] for n in ("0", "1", "2_or_more")]
        assert sum(parts) == pytest.approx(1.0)
        assert all(0.05 < part < 0.8 for part in parts)
    by_modality = [curve(config, f"eval/loss_by_modality/{name}")[-1] for name in ("text", "image")]
    assert min(by_modality) < result["eval_loss"] < max(by_modality)
    assert abs(curve(config, "moe/causal_gap")[-1]) < 1.0


def test_a_resumed_run_has_the_same_curve(root: Path, sparse_run: tuple[RunConfig, dict[str, Any]]) -> None:
    config = moe_config(root, "resumed", [4, 4], depth=0.5)
    assert run(config, Recorder(stop_after=5))["status"] == "stopped"
    assert run(config, Recorder())["resumed_from"] == 5
    assert curve(config) == curve(sparse_run[0])
    for name in ("eval/loss", "moe/causal_gap"):
        assert curve(config, name) == curve(sparse_run[0], name), "thresholds are part of a checkpoint"


def test_upcycling_starts_where_the_seed_is(root: Path, seed_run: RunConfig) -> None:
    config = moe_config(root, "upcycled", [4, 2], trainer__init_from=seed_run.export.dir, trainer__upcycle_steps=6)
    config.model.experts.noise = False
    config.trainer.lr, config.trainer.eval_every = 1e-3, 1
    result = run(config, Recorder())
    losses = curve(config, "eval/loss")
    start = curve(seed_run, "eval/loss")[-1]
    assert losses[0] == pytest.approx(start, abs=0.05)
    assert max(losses) < start + 0.1, "annealing does not lose what the seed knew"
    assert result["status"] == "done"
    imbalance = curve(config, "moe/tokens_with_2_or_more/text")
    assert imbalance[0] == 1.0, "at first all experts take all tokens"
    assert imbalance[-1] < 0.5
    assert load_hf(export(config)).spec.experts.groups == (4, 2)


def test_auxiliary_routers_are_trained_in_a_stage_of_their_own(
    root: Path, sparse_run: tuple[RunConfig, dict[str, Any]]
) -> None:
    source = sparse_run[0]
    config = moe_config(
        root, "routers", [4, 4], trainer__init_from=source.export.dir, trainer__objective="routers", trainer__steps=8
    )
    run(config, Recorder())
    assert curve(config)[-1] < curve(config)[0], "binary cross-entropy"
    assert curve(config, "moe/auxiliary_accuracy")[-1] > 0.6
    before, after = load_hf(source.export.dir), load_hf(export(config))
    assert after.spec.experts.causal == "auxiliary"
    for name, value in before.named_parameters():
        assert torch.equal(value, after.get_parameter(name)), "the model itself is frozen"


@pytest.mark.parametrize(
    ("groups", "changes", "field"),
    [
        ([4, 4], {"trainer__upcycle_steps": 5}, "trainer.upcycle_steps"),
        ([4, 4], {"trainer__objective": "routers"}, "trainer.objective"),
        ([], {"trainer__upcycle_steps": 5, "trainer__init_from": "x"}, "model.experts.groups"),
    ],
)
def test_stages_that_need_a_model_say_so(root: Path, groups: list[int], changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(moe_config(root, "wrong", groups, **changes))
    assert raised.value.field == field


def test_only_a_model_of_one_expert_a_group_is_upcycled(
    root: Path, sparse_run: tuple[RunConfig, dict[str, Any]]
) -> None:
    folder = sparse_run[0].export.dir
    config = moe_config(root, "twice", [4, 4], trainer__init_from=folder, trainer__upcycle_steps=5)
    with pytest.raises(ConfigError, match="one for each of the same groups"):
        run(config, Recorder())


def test_a_vocabulary_without_room_for_the_modalities_is_an_error(root: Path) -> None:
    config = moe_config(root, "narrow", [4, 4])
    config.model.modality_tokens = [8192]
    with pytest.raises(ConfigError) as raised:
        run(config, Recorder())
    assert raised.value.field == "model.modality_tokens"

"""Training with experts over ranks, FSDP2 and sequence parallelism: the curve of one process, and its checkpoints."""

from pathlib import Path
from typing import Any

import pytest

from conf.schema import ExpertsConfig, RunConfig
from tests.distributed.training_runs import Case, Recorder, curve, make_config, make_data, run_cases
from tests.helpers.dist import run_distributed
from trainers.pretrain import run

METRICS = ("train/loss", "optim/grad_norm", "moe/load_imbalance/text", "moe/tokens_with_0/image")


def expert_config(root: Path, name: str, **changes: Any) -> RunConfig:
    config = make_config(root, name, **{"trainer__steps": 6, "trainer__eval_every": 6, **changes})
    config.model.modalities, config.model.modality_tokens = ["text", "image"], [60]
    config.model.experts = ExpertsConfig(groups=[2, 2], noise=True, pool_windows=1)
    if config.sharding.expert_degree > 1:
        config.sharding.kind = "fsdp"
    config.trainer.micro_batch = 1
    return config


def test_two_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    alone = expert_config(tmp_path, "alone")
    make_data(alone)
    run(alone, Recorder())
    token_ring = {"sequence__strategy": "token_ring", "sequence__layout": "zigzag"}
    runs = {
        "sequence and experts": expert_config(
            tmp_path, "both", sharding__expert_degree=2, trainer__recompute="full", **token_ring
        ),
        "data and experts": expert_config(tmp_path, "data", sharding__expert_degree=2, sequence__degree=1),
        "sequence": expert_config(tmp_path, "sequence", **token_ring),
        "stopped": expert_config(tmp_path, "stopped", sharding__expert_degree=2, sequence__degree=1),
    }
    cases = [Case(config, 3 if name == "stopped" else 0) for name, config in runs.items()]
    results = run_distributed(run_cases, 2, cases)
    exact = {name: curve(alone, name) for name in METRICS}
    for name, config in runs.items():
        steps = 3 if name == "stopped" else 6
        for metric in METRICS:
            assert curve(config, metric) == pytest.approx(exact[metric][:steps], abs=2e-3), (name, metric)
    assert results[0][3]["status"] == "stopped"
    continued = expert_config(tmp_path, "stopped")
    assert run(continued, Recorder())["resumed_from"] == 3
    assert curve(continued) == pytest.approx(exact["train/loss"], abs=2e-3), "one process reads what two wrote"

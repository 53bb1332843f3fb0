"""What a whole run and its export leave in Weights & Biases, offline, read back from the files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.schema import RunConfig
from tests.distributed.training_runs import Recorder, make_config, make_data
from tests.helpers import wandb_file
from tests.helpers.wandb_server import Server, wandb_server
from trainers.export import export
from trainers.metrics import METRICS
from trainers.pretrain import run

wandb = pytest.importorskip("wandb")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    root = tmp_path_factory.mktemp("wandb")
    patch = pytest.MonkeyPatch()
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        patch.delenv(name, raising=False)
    steps = {"trainer__steps": 6, "trainer__checkpoint_every": 3, "trainer__eval_every": 6, "trainer__log_every": 2}
    config = make_config(root, "told", **steps, tracker__wandb="offline", tracker__group="a-sweep")
    make_data(config)
    control = Recorder()
    run(config, control)
    assert not [event["message"] for event in control.events if "WARNING" in event.get("message", "")]
    wandb.teardown()  # its service writes the last records when it ends
    patch.undo()
    return config


@pytest.fixture(scope="module")
def told(config: RunConfig) -> list[Any]:
    return wandb_file.records(Path(config.run_dir))


def artifacts(found: list[Any]) -> dict[str, Any]:
    """Type -> the newest artifact record."""
    logged = [r.artifact for r in found if r.HasField("artifact")]
    logged += [r.request.log_artifact.artifact for r in found if r.request.HasField("log_artifact")]
    return {artifact.type: artifact for artifact in logged}


def test_runs_are_grouped_and_metrics_have_units_and_goals(told: list[Any]) -> None:
    (started,) = [record.run for record in told if record.HasField("run")]
    assert started.run_group == "a-sweep"
    settings = {item.key: json.loads(item.value_json) for item in started.config.update}
    assert settings["metrics"]["train/loss"]["unit"] == "nats/token"
    assert settings["git_revision"]
    defined = {m.name or m.glob_name: m for m in (r.metric for r in told if r.HasField("metric"))}
    assert {row.name + "*" * row.name.endswith("/") for row in METRICS} <= set(defined)
    assert (defined["eval/loss"].summary.min, defined["throughput/tokens_per_sec"].summary.max) == (True, True)


def test_metrics_tables_and_pictures_are_there(told: list[Any], config: RunConfig) -> None:
    values = wandb_file.history(told)
    assert len(values["train/loss"]) == 6
    assert len(values["system/memory_gb/0"]) == 4, "with steps 1, 2, 4 and 6"
    assert json.loads(values["samples/_type"][-1]) == "table-file"
    (folder,) = Path(config.run_dir).glob("wandb/offline-run-*")
    for name in ("loss", "loss_by_position", "throughput", "memory"):
        path = json.loads(values[f"pictures/{name}/path"][-1])
        assert (folder / "files" / path).read_bytes().startswith(b"\x89PNG")


def sync(folders: list[Path], server: Server, tmp_path: Path) -> None:
    """`wandb sync`, as a user runs it, in copies of the folders."""
    program = Path(sys.executable).with_name("wandb")
    environment = os.environ | {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": 40 * "a", "WANDB_DIR": str(tmp_path)}
    for folder in folders:
        copy = shutil.copytree(folder, tmp_path / folder.name)
        done = subprocess.run(
            [program, "sync", "--yes", copy], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_wandb_sync_sends_an_offline_run(told: list[Any], config: RunConfig, tmp_path: Path) -> None:
    folder = min(Path(config.run_dir).glob("wandb/offline-run-*"))  # training's, were there an export's too
    with wandb_server() as server:
        sync([folder], server, tmp_path)
    assert (server.runs[0]["project"], server.runs[0]["groupName"]) == ("sundog", "a-sweep")
    steps = {line["_step"]: line for line in server.streams["wandb-history.jsonl"]}
    assert [steps[step]["train/loss"] for step in sorted(steps)] == [
        json.loads(value) for value in wandb_file.history(told)["train/loss"]
    ]
    names = {server.artifacts[identifier]["artifactCollectionName"] for identifier in server.committed}
    assert {found.name for found in artifacts(told).values()} <= names
    assert set(server.committed) == set(server.artifacts), "all that were begun"
    assert [server.artifacts[one]["artifactTypeName"] for one in server.used] == ["dataset"]
    for path in folder.glob("files/media/*/**/*.*"):
        assert server.files[f"run/{path.relative_to(folder / 'files')}"] == path.read_bytes()


def test_the_lineage_goes_from_dataset_to_checkpoint_to_export(
    told: list[Any], config: RunConfig, tmp_path: Path
) -> None:
    found = artifacts(told)
    assert found["dataset"].name == "dataset-" + "f" * 12
    assert json.loads(found["dataset"].metadata)["packed"]["fingerprint"] == "f" * 64
    checkpoint = found["model"]
    metadata = json.loads(checkpoint.metadata)
    assert (metadata["step"], metadata["made_from"]) == (6, found["dataset"].name)
    assert Path(metadata["folder"]).name == "step-000000006"
    assert {entry["bytes"] > 0 for entry in metadata["files"].values()} == {True}
    assert set(checkpoint.aliases) == {"latest", "step-6"}

    export(config)
    wandb.teardown()
    exported = artifacts(wandb_file.records(Path(config.run_dir)))
    assert exported["model"].name == checkpoint.name
    assert exported["model"].digest == checkpoint.digest
    origin = json.loads(exported["export"].metadata)
    assert (origin["step"], origin["made_from"]) == (6, checkpoint.name)
    with wandb_server() as server:
        sync([max(Path(config.run_dir).glob("wandb/offline-run-*"))], server, tmp_path)
    kinds = {one: server.artifacts[one]["artifactTypeName"] for one in server.committed}
    assert sorted(kinds.values()) == ["export", "model"]
    assert [kinds[one] for one in server.used] == ["model"], "an input of the export, not only one more output"

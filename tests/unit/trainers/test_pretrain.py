"""Single-process runs: what they leave behind, what stops them, export and warm start."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from conf.errors import EXIT_CONFIG, EXIT_DONE, ConfigError, DataError
from conf.schema import RunConfig
from data.tokenize import load_tokenizer, train_tokenizer
from models.hf import load_hf
from tests.distributed.training_runs import Recorder, curve, documents, make_config, make_data
from trainers.checkpoint import load_weights
from trainers.export import export
from trainers.pretrain import load_config, run

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    make_data(make_config(folder, "data"))
    return folder


@pytest.fixture(scope="module")
def finished(root: Path) -> RunConfig:
    config = make_config(root, "finished", trainer__steps=6, trainer__checkpoint_every=2, tracker__wandb="disabled")
    assert run(config, Recorder())["status"] == "done"
    return config


@pytest.fixture(autouse=True)
def no_group_left() -> Iterator[None]:
    yield
    assert not dist.is_initialized(), "run leaves its process group"


def test_a_finished_run_does_nothing_again(finished: RunConfig) -> None:
    before = (Path(finished.run_dir) / "metrics.jsonl").read_text()
    result = run(finished, Recorder())
    assert (result["status"], result["step"], result["resumed_from"]) == ("done", 6, 6)
    assert (Path(finished.run_dir) / "metrics.jsonl").read_text() == before
    assert result["loss"] == curve(finished)[-1]


def test_a_longer_run_goes_on_and_says_what_changed(root: Path, finished: RunConfig) -> None:
    import shutil

    config = make_config(root, "longer", trainer__steps=8, trainer__checkpoint_every=2)
    shutil.copytree(finished.run_dir, config.run_dir)
    control = Recorder()
    result = run(config, control)
    assert (result["resumed_from"], result["step"]) == (6, 8)
    said = [event["message"] for event in control.events if event["kind"] == "log"]
    assert any("trainer.steps 6 -> 8" in line for line in said)
    assert curve(config)[:6] == curve(finished)


def test_export_is_the_checkpoint_with_its_lineage(finished: RunConfig) -> None:
    folder = export(finished)
    weights = load_weights(Path(finished.run_dir) / "checkpoints" / "step-000000006")
    exported = load_hf(folder).state_dict()
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], weights[name]) for name in weights)
    assert load_tokenizer(folder).vocab_size == 300
    origin = json.loads((folder / "sundog.json").read_text())
    assert (origin["step"], origin["shards"], origin["stages"]) == (6, "f" * 64, {"packed": "f" * 64})
    assert origin["loss"] == curve(finished)[-1]
    assert not dist.is_initialized()


def test_export_of_a_step_and_its_mistakes(root: Path, finished: RunConfig) -> None:
    finished.export.step = 4
    assert json.loads((export(finished) / "sundog.json").read_text())["step"] == 4
    finished.export.step = 3
    with pytest.raises(DataError, match="complete checkpoints: 4, 6"):
        export(finished)
    finished.export.step = 0
    with pytest.raises(DataError, match="run `sundog train` first"):
        export(make_config(root, "never-run"))


def test_training_starts_from_a_model_folder(root: Path, finished: RunConfig) -> None:
    folder = export(finished)
    config = make_config(root, "warm", trainer__init_from=str(folder), trainer__steps=5)
    run(config, Recorder())
    cold = make_config(root, "cold", trainer__steps=5)
    run(cold, Recorder())
    assert curve(config)[0] < curve(cold)[0] - 0.3, "it begins where the other run ended"


def test_a_checkpoint_of_another_model_is_refused(root: Path, finished: RunConfig) -> None:
    config = make_config(root, "finished", trainer__steps=9)
    config.model.layers = 3
    with pytest.raises(DataError, match="layers: 2 != 3"):
        run(config, Recorder())
    config = make_config(root, "finished", trainer__steps=9, trainer__batch=8)
    with pytest.raises(DataError, match=r"trainer\.batch: 4 != 8"):
        run(config, Recorder())


def test_a_loss_that_is_not_finite_ends_the_run_before_it_harms(root: Path) -> None:
    config = make_config(root, "hot", trainer__lr=1e30, trainer__checkpoint_every=1, trainer__eval_every=0)
    with pytest.raises(ConfigError, match="must stay finite") as caught:
        run(config, Recorder())
    assert caught.value.field == "trainer.lr"


def test_data_that_does_not_fit(root: Path, tmp_path: Path) -> None:
    config = make_config(root, "missing")
    config.data.dir = str(tmp_path / "nowhere")
    with pytest.raises(DataError, match="sundog pack"):
        run(config, Recorder())
    config = make_config(tmp_path, "swapped")
    make_data(config)
    train_tokenizer(documents(5), 280, Path(config.data.dir) / "tokenizer")
    with pytest.raises(DataError, match="the tokenizer that made them"):
        run(config, Recorder())


def test_the_number_of_processes_must_be_that_of_the_config(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(root, "ranks")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match=r"cluster\.ranks=2"):
        run(config, Recorder())


def test_config_from_a_file(root: Path, tmp_path: Path) -> None:
    config = make_config(root, "file", trainer__steps=7)
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.structured(config), path)
    loaded = load_config(path)
    assert (loaded.trainer.steps, loaded.model.dim, loaded.data.dir) == (7, 32, config.data.dir)
    path.write_text("trainer: {stepz: 3}\n")
    with pytest.raises(ConfigError, match="stepz"):
        load_config(path)
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_config(tmp_path / "none.yaml")


def test_the_module_runs_as_a_program(root: Path, tmp_path: Path) -> None:
    config = make_config(root, "program", trainer__steps=2, trainer__warmup_steps=1)
    path = tmp_path / "config.yaml"
    OmegaConf.save(OmegaConf.structured(config), path)
    command = [sys.executable, "-m", "trainers.pretrain", "--config"]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == EXIT_DONE, done.stderr
    assert "step 2/2  loss" in done.stdout
    assert len(curve(config)) == 2
    wrong = subprocess.run([*command, "none.yaml"], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert wrong.returncode == EXIT_CONFIG
    assert wrong.stderr.startswith("config error: --config = none.yaml")

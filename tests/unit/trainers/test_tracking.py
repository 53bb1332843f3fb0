import sys
from pathlib import Path
from typing import Any, cast

import pytest

from conf.errors import ConfigError
from conf.schema import RunConfig
from trainers.journal import read_journal
from trainers.tracking import Tracker, require_tracker, run_id
from trainers.wandb_run import WandbRun


def _config(run_dir: Path, mode: str = "offline") -> RunConfig:
    config = RunConfig(name="unit", run_dir=str(run_dir))
    config.tracker.wandb = mode
    config.tracker.group, config.tracker.tags = "sweep", ["test"]
    return config


def test_the_id_is_kept_in_the_folder_and_a_checkpoint_wins(tmp_path: Path) -> None:
    first = run_id(tmp_path)
    assert len(first) == 8
    assert run_id(tmp_path) == first
    assert run_id(tmp_path, "from0000") == "from0000"
    assert run_id(tmp_path) == "from0000"


def test_wandb_offline_keeps_its_id_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    said: list[str] = []
    for resume_step in (0, 3):
        tracker = Tracker(_config(tmp_path), "sun00001", resume_step, 2, said.append)
        for step in range(resume_step + 1, resume_step + 5):
            tracker.log(step, {"train/loss": 1.0 / step, "eval/loss_by_position/0-63": 2.0})
        tracker.samples(resume_step + 4, [{"prompt": "a", "continuation": "b"}])
        tracker.sync()
        tracker.close(finished=True)
    assert len(said) == 2
    assert all(line.startswith("wandb run sun00001: ") for line in said)
    runs = sorted(path.name for path in (tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) in (1, 2), (
        "one folder an attempt, offline-run-TIME-ID (within a second the same one, or TIME-ID-1)"
    )
    assert {name.split("-")[3] for name in runs} == {"sun00001"}
    assert list((tmp_path / "wandb").glob("offline-run-*/run-sun00001.wandb"))
    assert [record["step"] for record in read_journal(tmp_path / "metrics.jsonl")] == list(range(1, 8))
    assert read_journal(tmp_path / "samples.jsonl")[-1]["rows"] == [{"prompt": "a", "continuation": "b"}]


class _Broken:
    """Stands in for a wandb run whose every call fails."""

    def __getattr__(self, name: str) -> Any:
        raise ConnectionError(f"no network for {name}")


def test_a_failing_tracker_is_loud_once_and_harmless(tmp_path: Path) -> None:
    said: list[str] = []
    tracker = Tracker(_config(tmp_path, "disabled"), "x", 0, 1, said.append)
    tracker._wandb = cast(WandbRun, _Broken())
    for step in (1, 2):
        tracker.log(step, {"train/loss": 1.0})
        tracker.samples(step, [])
    tracker.close(finished=True)
    assert len(said) == 1
    assert "wandb failed (log)" in said[0]
    assert "no network for log" in said[0]
    assert [record["step"] for record in read_journal(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_tracker_that_cannot_start_is_loud_and_harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # the import fails
    said: list[str] = []
    tracker = Tracker(_config(tmp_path), "x", 0, 1, said.append)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close(finished=True)
    assert len(said) == 1
    assert "wandb failed (start)" in said[0]


def test_a_tracker_that_is_not_installed_is_a_config_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed"):
        require_tracker(_config(tmp_path))
    require_tracker(_config(tmp_path, "disabled"))


def test_an_unknown_metric_is_a_bug(tmp_path: Path) -> None:
    tracker = Tracker(_config(tmp_path, "disabled"), "x", 0, 1, lambda message: None)
    with pytest.raises(KeyError, match="no row"):
        tracker.log(1, {"train/lost": 1.0})
    tracker.close(finished=False)

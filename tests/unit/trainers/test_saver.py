"""Checkpoints that a thread writes while training goes on."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.training_runs import Recorder, curve, make_config, make_data
from trainers.checkpoint import Checkpoints
from trainers.checkpoint_folder import checkpoints_folder, complete_checkpoints, damage, step_of
from trainers.pretrain import run

ROOT = Path(__file__).parents[3]
SETTINGS: dict[str, Any] = {
    "trainer__steps": 10,
    "trainer__checkpoint_every": 4,
    "trainer__log_every": 1,
    "trainer__eval_every": 0,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saver")
    make_data(make_config(folder, "data"))
    return folder


@pytest.fixture(scope="module")
def expected(root: Path) -> list[float]:
    """The losses of an undisturbed run."""
    config = make_config(root, "undisturbed", **SETTINGS)
    run(config, Recorder())
    return curve(config)


class Watcher(Recorder):
    """Tells when a step was done."""

    def __init__(self, step: int, stop_after: int = 0) -> None:
        super().__init__(stop_after)
        self._step, self.there = step, threading.Event()

    def emit(self, event: dict[str, Any]) -> None:
        super().emit(event)
        if event["kind"] == "metrics" and event["step"] == self._step:
            self.there.set()


def order(control: Recorder) -> list[str]:
    return [f"{event['kind']} {event['step']}" for event in control.events if event["kind"] != "log"]


def test_training_goes_on_while_a_checkpoint_is_written(
    root: Path, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, control, commit = make_config(root, "beside", **SETTINGS), Watcher(step=6), Checkpoints._commit

    def held(*arguments: Any) -> None:
        assert control.there.wait(30), "two more steps are done before the checkpoint is"
        commit(*arguments)

    monkeypatch.setattr(Checkpoints, "_commit", held)
    assert run(config, control)["checkpoint"].endswith("step-000000010")
    assert curve(config) == expected, "the copies do not change under the thread's hands"
    told = order(control)
    assert told.index("metrics 6") < told.index("checkpoint 4") < told.index("checkpoint 8")
    folder = checkpoints_folder(config.run_dir)
    assert [step_of(path) for path in complete_checkpoints(folder)] == [10, 8]
    stalls = curve(config, "time/checkpoint_stall_sec")
    assert len(stalls) >= 2
    assert min(stalls) > 0


def test_a_stop_waits_for_its_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, control, commit = make_config(root, "stopped", **SETTINGS), Recorder(stop_after=5), Checkpoints._commit

    def slow(*arguments: Any) -> None:
        time.sleep(0.2)
        commit(*arguments)

    monkeypatch.setattr(Checkpoints, "_commit", slow)
    result = run(config, control)
    assert (result["status"], result["step"]) == ("stopped", 5)
    assert [step_of(path) for path in complete_checkpoints(checkpoints_folder(config.run_dir))] == [5, 4]
    assert order(control)[-2:] == ["checkpoint 4", "checkpoint 5"]


def test_an_error_in_training_leaves_the_pending_checkpoint_whole(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, control, commit = make_config(root, "error", **SETTINGS), Watcher(step=5), Checkpoints._commit

    def held(*arguments: Any) -> None:
        control.there.wait(30)
        commit(*arguments)

    def broken(*arguments: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Checkpoints, "_commit", held)
    monkeypatch.setattr("trainers.loop.agree", lambda *a: broken() if control.there.is_set() else (False, True))
    with pytest.raises(ZeroDivisionError):
        run(config, control)
    assert [step_of(path) for path in complete_checkpoints(checkpoints_folder(config.run_dir))] == [4]


KILLED = """
import os, signal, sys, time
from trainers import checkpoint
from trainers.control import LocalControl
from trainers.pretrain import load_config, run

inner = getattr(checkpoint, sys.argv[2])

def kill(path, *arguments):
    if "step-000000008" in path.name:
        time.sleep(0.1)  # training goes on meanwhile
        os.kill(os.getpid(), signal.SIGKILL)
    inner(path, *arguments)

setattr(checkpoint, sys.argv[2], kill)
run(load_config(sys.argv[1]), LocalControl(quiet=True))
"""


@pytest.mark.parametrize("moment", ["fsync_folder", "mark_complete"])
def test_a_kill_during_the_write_leaves_the_checkpoint_before(root: Path, expected: list[float], moment: str) -> None:
    from omegaconf import OmegaConf

    config = make_config(root, f"killed-{moment}", **SETTINGS)
    path = root / f"{moment}.yaml"
    OmegaConf.save(OmegaConf.structured(config), path)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), moment], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL
    folder = checkpoints_folder(config.run_dir)
    assert [step_of(path) for path in complete_checkpoints(folder)] == [4]
    assert damage(complete_checkpoints(folder)[0]) == ""
    assert [path.name for path in folder.iterdir() if "8" in path.name], "it was being written"
    assert run(config, Recorder())["resumed_from"] == 4
    assert curve(config) == expected
    assert [step_of(path) for path in complete_checkpoints(folder)] == [10, 8]

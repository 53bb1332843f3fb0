"""Faults of a whole ``sundog train``: whatever is done to a run, it loses no batch and ends with the same bits."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.supervisor import read_attempts
from tests.helpers.cli import environment, prepare_data, sundog, write_corpus
from trainers.checkpoint import load_weights
from trainers.checkpoint_folder import checkpoints_folder, complete_checkpoints

STEPS = 60
SETTINGS = [
    "data=path",
    "data.path=corpus",
    "data.dir=data",
    "model=tiny",
    "data.context=128",
    "data.vocab_size=400",
    "data.shard_documents=60",
    f"trainer.steps={STEPS}",
    "trainer.batch=8",
    "trainer.micro_batch=8",
    "trainer.lr=1e-3",
    "trainer.warmup_steps=2",
    "trainer.checkpoint_every=5",
    "trainer.eval_every=0",
    "trainer.log_every=1",
    "cluster.ranks=2",
]
PATIENCE = ["trainer.collective_timeout_sec=10", "cluster.hang_timeout_sec=60", "cluster.max_restarts=10"]
TIMEOUT_SEC = 200.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with packed shards in it."""
    folder = tmp_path_factory.mktemp("faults")
    write_corpus(folder / "corpus")
    prepare_data(folder, SETTINGS)
    return folder


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> dict[int, float]:
    """The loss of every step of a run that nothing happens to."""
    done = sundog("train", "name=undisturbed", *SETTINGS, cwd=place, timeout=TIMEOUT_SEC)
    assert done.code == 0, done.err
    found = losses(place / "runs" / "undisturbed")
    assert sorted(found) == list(range(1, STEPS + 1))
    return found


def losses(run_dir: Path) -> dict[int, float]:
    """Return step -> loss; a step that is there twice fails."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = []
    for line in lines:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            assert line is lines[-1], f"a torn line inside {path}"
    rows = [(record["step"], record["train/loss"]) for record in records if "train/loss" in record]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def start(name: str, place: Path, *settings: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "train", f"name={name}", *SETTINGS, *settings],
        cwd=place,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def disturb(run: "subprocess.Popen[str]", *harms: tuple[int, Callable[[], object]]) -> str:
    """Do each harm as soon as the run prints that it has done its step; return all that it prints until its end."""
    watchdog = threading.Timer(TIMEOUT_SEC, run.kill)
    watchdog.start()
    seen, left = [], list(harms)
    assert run.stdout is not None
    for line in run.stdout:
        seen.append(line)
        if left and f"step {left[0][0]}/" in line:
            left.pop(0)[1]()
    run.wait(30)
    watchdog.cancel()
    assert not left, "".join(seen)
    return "".join(seen)


def rank_pids(run_dir: Path) -> list[int]:
    """Return the processes of the newest attempt, in rank order."""
    started: list[dict[str, Any]] = [record for record in read_attempts(run_dir) if record["event"] == "started"]
    return [rank["pid"] for rank in started[-1]["ranks"]]


def assert_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while alive := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"processes {alive} are left"
        time.sleep(0.1)


def signal_rank(run_dir: Path, rank: int, number: int) -> None:
    os.kill(rank_pids(run_dir)[rank], number)


def tear_newest_checkpoint(run_dir: Path) -> None:
    """Cut a file of it while no rank lives to write another, so that the next gang meets it."""
    for pid in rank_pids(run_dir):
        os.kill(pid, signal.SIGKILL)
    newest = complete_checkpoints(checkpoints_folder(str(run_dir)))[0]
    file = min(newest.glob("*.distcp"))
    os.truncate(file, file.stat().st_size // 2)


def assert_equal_to_the_last_bit(run_dir: Path, undisturbed: dict[int, float]) -> None:
    """The loss of every step, and the weights after the last one."""
    assert losses(run_dir) == undisturbed
    name = f"checkpoints/step-{STEPS:09d}"
    found, expected = load_weights(run_dir / name), load_weights(run_dir.parent / "undisturbed" / name)
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []


def test_a_run_in_chaos_ends_with_the_bits_of_an_undisturbed_one(place: Path, undisturbed: dict[int, float]) -> None:
    run_dir = place / "runs" / "chaos"
    run = start("chaos", place, *PATIENCE)
    output = disturb(
        run,
        (12, lambda: signal_rank(run_dir, 1, signal.SIGKILL)),
        (23, lambda: signal_rank(run_dir, 0, signal.SIGSTOP)),
        (34, lambda: tear_newest_checkpoint(run_dir)),
        (45, run.kill),
    )
    assert run.returncode == -signal.SIGKILL, output
    assert_gone(rank_pids(run_dir))
    done = sundog("train", "name=chaos", *SETTINGS, *PATIENCE, cwd=place, timeout=TIMEOUT_SEC)
    assert done.code == 0, done.err
    assert_equal_to_the_last_bit(run_dir, undisturbed)
    failures = [record for record in read_attempts(run_dir) if record["event"] == "failed"]
    causes = ("its process died", "stopped by a signal")
    told = {(failure["rank"], cause) for failure in failures for cause in causes if cause in failure["message"]}
    assert {(1, causes[0]), (0, causes[1])} <= told, failures
    assert len(failures) >= 3
    assert [record["event"] for record in read_attempts(run_dir)][-4:] == ["started", "abandoned", "started", "done"]
    assert "is damaged" in output
    assert_gone([rank["pid"] for record in read_attempts(run_dir) for rank in record.get("ranks", [])])


def test_sigterm_checkpoints_and_the_same_command_goes_on(place: Path, undisturbed: dict[int, float]) -> None:
    run_dir = place / "runs" / "stopped"
    run = start("stopped", place)
    output = disturb(run, (13, lambda: run.send_signal(signal.SIGTERM)))
    assert run.returncode == 75, output
    reached = max(losses(run_dir))
    assert 13 <= reached < STEPS
    assert json.loads((run_dir / "status.json").read_text())["step"] == reached
    assert_gone(rank_pids(run_dir))
    done = sundog("train", "name=stopped", *SETTINGS, cwd=place, timeout=TIMEOUT_SEC)
    assert done.code == 0, done.err
    assert_equal_to_the_last_bit(run_dir, undisturbed)
    events = [(record["attempt"], record["event"]) for record in read_attempts(run_dir)]
    assert events == [(1, "started"), (1, "stopped"), (2, "started"), (2, "done")]

"""Faults of a whole ``sundog train``: a killed rank and a SIGTERM cost no batch and change no loss."""

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

from cluster.supervisor import read_attempts
from tests.helpers.cli import environment, prepare_data, sundog, write_corpus

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


def start(name: str, place: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "launch", "train", f"name={name}", *SETTINGS],
        cwd=place,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def disturb_after(step: int, run: "subprocess.Popen[str]", act: Callable[[], None]) -> str:
    """Call ``act`` as soon as the run prints that it has done ``step``; return all that it prints until its end."""
    watchdog = threading.Timer(TIMEOUT_SEC, run.kill)
    watchdog.start()
    seen, acted = [], False
    assert run.stdout is not None
    for line in run.stdout:
        seen.append(line)
        if not acted and f"step {step}/" in line:
            act()
            acted = True
    run.wait(30)
    watchdog.cancel()
    assert acted, "".join(seen)
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


def test_a_killed_rank_changes_no_loss(place: Path, undisturbed: dict[int, float]) -> None:
    run_dir = place / "runs" / "killed"
    run = start("killed", place)
    victims: list[int] = []

    def kill() -> None:
        victims.extend(rank_pids(run_dir))
        os.kill(victims[1], signal.SIGKILL)

    output = disturb_after(12, run, kill)
    assert run.returncode == 0, output
    events = [(record["attempt"], record["event"]) for record in read_attempts(run_dir)]
    assert events == [(1, "started"), (1, "failed"), (2, "started"), (2, "done")], output
    assert read_attempts(run_dir)[1]["rank"] == 1
    assert "rank 1" in output
    assert losses(run_dir) == pytest.approx(undisturbed, rel=1e-6)
    assert_gone(victims + rank_pids(run_dir))


def test_sigterm_checkpoints_and_the_same_command_goes_on(place: Path, undisturbed: dict[int, float]) -> None:
    run_dir = place / "runs" / "stopped"
    run = start("stopped", place)
    output = disturb_after(13, run, lambda: run.send_signal(signal.SIGTERM))
    assert run.returncode == 75, output
    reached = max(losses(run_dir))
    assert 13 <= reached < STEPS
    assert json.loads((run_dir / "status.json").read_text())["step"] == reached
    assert_gone(rank_pids(run_dir))
    done = sundog("train", "name=stopped", *SETTINGS, cwd=place, timeout=TIMEOUT_SEC)
    assert done.code == 0, done.err
    assert losses(run_dir) == pytest.approx(undisturbed, rel=1e-6)
    events = [(record["attempt"], record["event"]) for record in read_attempts(run_dir)]
    assert events == [(1, "started"), (1, "stopped"), (2, "started"), (2, "done")]

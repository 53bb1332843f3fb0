"""A run that goes through ``sundog submit`` to a cluster of ``benchmarks.nodes``, seen from outside."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.nodes import Nodes
from cluster.supervisor import read_attempts
from data.curate import curate
from data.order import order
from data.pack import pack
from data.stages import serial_units
from launch.preflight import load_config
from trainers.journal import METRICS_FILE, read_journal

ROOT = Path(__file__).resolve().parents[1]
BOUND_SEC = 240.0  # until a run answers, on a machine that others use too
SMALL_RUN = [
    "data=path",
    "model=tiny",
    "data.context=128",
    "data.vocab_size=400",
    "data.shard_documents=60",
    "trainer.steps=100000",
    "trainer.batch=8",
    "trainer.micro_batch=4",
    "trainer.lr=1e-3",
    "trainer.warmup_steps=2",
    "trainer.checkpoint_every=10",
    "trainer.eval_every=0",
    "trainer.log_every=50",
    "trainer.collective_timeout_sec=15",
    "sequence.timeout=15",
    "cluster=attached",
    "cluster.hang_timeout_sec=30",
    "cluster.max_restarts=10",
]


@dataclass
class Run:
    """A run that goes through ``sundog submit``, seen from outside."""

    name: str
    folder: Path
    nodes: Nodes
    settings: list[str]
    meanwhile: Callable[[], object] = lambda: None  # done again and again while something is awaited

    def start(self) -> None:
        command = [sys.executable, "-m", "launch", "submit", "--address", self.nodes.url, "train", f"name={self.name}"]
        self.log = self.folder / f"{self.name}.log"
        self.client = subprocess.Popen(
            [*command, f"run_dir={self.run_dir}", f"data.dir={self.folder}/data", *self.settings],
            cwd=ROOT,
            env=self.nodes.environment | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("ab"),
            stderr=subprocess.STDOUT,
        )

    @property
    def run_dir(self) -> Path:
        return self.folder / "disk" / self.name

    def losses(self) -> dict[int, float]:
        """Step -> loss, as far as the run has come."""
        records = read_journal(self.run_dir / METRICS_FILE)
        return {record["step"]: record["train/loss"] for record in records}

    def step(self) -> int:
        return max(self.losses(), default=0)

    def ranks(self) -> list[int]:
        """Process ids of the newest gang, in rank order."""
        started = [record for record in read_attempts(self.run_dir) if record["event"] == "started"]
        return [rank["pid"] for rank in started[-1]["ranks"]] if started else []

    def gangs(self) -> int:
        """How many gangs have been started."""
        return sum(record["event"] == "started" for record in read_attempts(self.run_dir))

    def await_gang(self, count: int, seconds: float) -> None:
        """Wait until ``count`` gangs have been started. Raises RuntimeError when they are not, or the run ends."""
        self._await(f"{count} gangs", lambda: self.gangs() >= count, seconds)

    def await_step(self, step: int, seconds: float) -> None:
        """Wait for a step. Raises RuntimeError when it does not come, or the run ends."""
        self._await(f"step {step}", lambda: self.step() >= step, seconds)

    def _await(self, what: str, there: Callable[[], bool], seconds: float) -> None:
        begun = time.monotonic()
        while not there():
            if self.client.poll() is not None or time.monotonic() - begun > seconds:
                raise RuntimeError(f"{self.name} did not come to {what} in {seconds:g} s:\n" + self.tail())
            self.meanwhile()
            time.sleep(0.3)

    def driver(self) -> int:
        return int(json.loads((self.run_dir / "status.json").read_text())["pid"])

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self) -> int:
        """Ask the run to checkpoint and end; return the exit code of its client."""
        self.client.send_signal(signal.SIGINT)
        return self.client.wait(BOUND_SEC)


def prepare(folder: Path, settings: list[str]) -> None:
    """A small corpus, packed, if it is not there yet."""
    corpus, beside = folder / "corpus", folder / "corpus.new"
    if not corpus.exists():
        beside.mkdir(exist_ok=True)
        for index in range(120):
            text = " ".join(f"Note {index * 31 + line} says {line * index} of {line}." for line in range(40))
            (beside / f"{index:04d}.txt").write_text(text)
        beside.rename(corpus)
    config = load_config([*settings, f"data.dir={folder}/data"])
    for stage in (curate, order, pack):
        stage(config, serial_units)

"""Chaos: one training run on a Ray cluster of several nodes, disturbed at random again and again, loses nothing.

``python -m benchmarks.chaos --rounds 30 --seed 0`` submits a run as a Ray job, does a random harm to it a round, waits
until it trains on by itself, repairs the machine (not the run), and prints what happened and how long it took. At the
end the loss of every step is compared, to the last bit, with a run that nothing happens to. Exit code 1: a round took
longer than its bound, a step is missing or there twice, or a loss differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.netns import Network, available
from benchmarks.nodes import Nodes
from cluster.supervisor import read_attempts
from conf.errors import EXIT_TERMINATED
from data.curate import curate
from data.order import order
from data.pack import pack
from data.stages import serial_units
from launch.preflight import load_config
from trainers.checkpoint_folder import checkpoints_folder, complete_checkpoints
from trainers.journal import METRICS_FILE, read_journal

ROOT = Path(__file__).resolve().parents[1]
BOUND_SEC = 240.0  # from the harm to the first new step, on a machine that others use too
DISK_MB = 64
SETTINGS = [
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
    "cluster.ranks=2",
    "cluster.placement=STRICT_SPREAD",
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

    def start(self) -> None:
        command = [sys.executable, "-m", "launch", "submit", "--address", self.nodes.url, "train", f"name={self.name}"]
        self.log = self.folder / f"{self.name}.log"
        self.client = subprocess.Popen(
            [*command, f"run_dir={self.run_dir}", f"data.dir={self.folder}/data", *self.settings],
            cwd=ROOT,
            env=self.nodes.environment | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=self.log.open("wb"),
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
        """Wait until ``count`` gangs have been started. Raises RuntimeError when they are not."""
        begun = time.monotonic()
        while self.gangs() < count:
            if self.client.poll() is not None or time.monotonic() - begun > seconds:
                raise RuntimeError(f"no new gang within {seconds:g} s:\n" + self.tail())
            time.sleep(0.2)

    def driver(self) -> int:
        return int(json.loads((self.run_dir / "status.json").read_text())["pid"])

    def await_step(self, step: int, seconds: float) -> float:
        """Wait for a step; return how long it took. Raises RuntimeError when it does not come, or the run ends."""
        begun = time.monotonic()
        while self.step() < step:
            if self.client.poll() is not None or time.monotonic() - begun > seconds:
                raise RuntimeError(f"{self.name} did not come to step {step} in {seconds:g} s:\n" + self.tail())
            time.sleep(0.2)
        return time.monotonic() - begun

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def stop(self) -> int:
        """Ask the run to checkpoint and end; return the exit code of its client."""
        self.client.send_signal(signal.SIGINT)
        return self.client.wait(BOUND_SEC)


@dataclass
class Scene:
    """What harms may use."""

    run: Run
    nodes: Nodes
    network: Network | None
    dice: random.Random

    def rank_node(self) -> int:
        return self.dice.randint(1, self.nodes.count)


def kill_rank(scene: Scene) -> str:
    rank, pid = scene.dice.choice(list(enumerate(scene.run.ranks())))
    os.kill(pid, signal.SIGKILL)
    return f"rank {rank}"


def kill_actor(scene: Scene) -> str:
    rank = scene.dice.randrange(2)
    program = (
        "import sys, ray; from ray.util.state import list_actors;"
        "ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False);"
        "found = [a for a in list_actors(sys.argv[2]) if a.class_name == 'Rank' and a.state == 'ALIVE'"
        " and a.name.endswith('-' + sys.argv[3])];"
        "ray.kill(ray.get_actor(found[0].name, namespace=found[0].ray_namespace))"
    )
    command = [sys.executable, "-c", program, scene.nodes.address, scene.nodes.url, str(rank)]
    done = subprocess.run(command, env=scene.nodes.environment, capture_output=True, text=True, timeout=90)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    return f"bundle {rank}, by ray.kill"


def kill_raylet(scene: Scene) -> str:
    node = scene.rank_node()
    os.kill(scene.nodes.raylet(node), signal.SIGKILL)
    return f"node {node}"


def kill_node(scene: Scene) -> str:
    node = scene.rank_node()
    scene.nodes.kill(node)
    return f"node {node}"


def kill_driver(scene: Scene) -> str:
    os.kill(scene.run.driver(), signal.SIGKILL)
    return "sundog train"


def kill_job_supervisor(scene: Scene) -> str:
    for process in scene.nodes.processes(0):
        with suppress(psutil.NoSuchProcess):
            if "JobSupervisor" in " ".join(process.cmdline()):
                process.kill()
                return "its actor on the head"
    raise RuntimeError("no job supervisor on the head")


def freeze_rank(scene: Scene) -> str:
    rank, pid = scene.dice.choice(list(enumerate(scene.run.ranks())))
    os.kill(pid, signal.SIGSTOP)
    return f"rank {rank}"


def cut_link(scene: Scene) -> str:
    assert scene.network is not None
    node, seconds = scene.rank_node(), scene.dice.choice([2, 25])
    scene.network.cut(node)
    time.sleep(seconds)
    scene.network.mend(node)
    return f"node {node}, {seconds} s"


def slow_link(scene: Scene) -> str:
    assert scene.network is not None
    node = scene.rank_node()
    scene.network.slow(node, "500kbit")
    time.sleep(10)
    scene.network.mend(node)
    return f"node {node}, 0.5 Mbit/s for 10 s"


def fill_disk(scene: Scene) -> str:
    """Hold the disk full until a checkpoint has failed."""
    filler, before = scene.run.folder / "disk" / "filler", scene.run.log.read_text().count("no checkpoint after")
    deadline = time.monotonic() + BOUND_SEC
    with filler.open("wb", buffering=0) as file:
        while scene.run.log.read_text().count("no checkpoint after") == before and time.monotonic() < deadline:
            with suppress(OSError):
                while True:
                    file.write(bytes(4096))
            time.sleep(0.01)
    filler.unlink()
    return "until a checkpoint failed"


def _harm_newest(scene: Scene, harm: Callable[[Path], None]) -> str:
    """Damage the newest checkpoint while no rank lives to write another, so that the next gang meets it."""
    for pid in scene.run.ranks():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    newest = complete_checkpoints(checkpoints_folder(str(scene.run.run_dir)))[0]
    harm(scene.dice.choice(sorted(newest.glob("*.distcp"))))
    return f"{newest.name}, and all ranks killed"


def tear_checkpoint(scene: Scene) -> str:
    return _harm_newest(scene, lambda file: os.truncate(file, file.stat().st_size // 2))


def corrupt_checkpoint(scene: Scene) -> str:
    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[scene.dice.randrange(len(content))] ^= 0x40
        file.write_bytes(content)

    return _harm_newest(scene, flip)


ANYWHERE = {
    "kill a rank": kill_rank,
    "kill an actor": kill_actor,
    "kill a raylet": kill_raylet,
    "kill a node": kill_node,
    "kill the driver": kill_driver,
    "kill the job supervisor": kill_job_supervisor,
    "freeze a rank": freeze_rank,
    "tear the newest checkpoint": tear_checkpoint,
    "corrupt the newest checkpoint": corrupt_checkpoint,
}
WITH_NETWORK = {"cut a link": cut_link, "slow a link": slow_link}
WITH_ROOT = {"fill the disk": fill_disk}


def rounds(scene: Scene, kinds: list[str]) -> tuple[list[dict[str, Any]], bool]:
    """Do one harm after another; return a row for each, and whether the run came through all."""
    harms = ANYWHERE | WITH_NETWORK | WITH_ROOT
    rows: list[dict[str, Any]] = []
    for number, kind in enumerate(kinds, 1):
        run = scene.run
        run.await_step(run.step() + scene.dice.randint(11, 25), BOUND_SEC)  # a checkpoint lies between two harms
        attempts, gangs, at, begun = len(read_attempts(run.run_dir)), run.gangs(), run.step(), time.monotonic()
        row: dict[str, Any] = {"round": number, "harm": kind, "step": at}
        rows.append(row)
        try:
            row["what"] = harms[kind](scene)
            row["replaced"] = ",".join(map(str, scene.nodes.restore())) or "-"
            if kind in ANYWHERE:  # the others may pass without a restart
                run.await_gang(gangs + 1, BOUND_SEC)
            run.await_step(at + 1, BOUND_SEC)
            row["sec"] = round(time.monotonic() - begun, 1)
            scene.nodes.restore()
            scene.nodes.await_nodes(scene.nodes.count)
        except RuntimeError as error:
            row["log"] = str(error)
            print(error, file=sys.stderr, flush=True)
            return rows, False
        events = [record for record in read_attempts(run.run_dir)[attempts:] if record["event"] != "started"]
        told = "; ".join(f"{e['event']}: {e.get('message', '')}"[:70] for e in events)
        row["log"] = told or ("the command was run again" if run.gangs() > gangs else "trained on")
        print(json.dumps(row), flush=True)
    return rows, True


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    columns = ("round", "harm", "what", "step", "sec", "replaced", "log")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=180).print(table, highlight=False)


def compare(disturbed: Run, undisturbed: Run) -> str:
    """What is wrong with the losses of the disturbed run; empty: nothing, to the last bit."""
    found, expected = disturbed.losses(), undisturbed.losses()
    lines = [record["step"] for record in read_journal(disturbed.run_dir / METRICS_FILE)]
    if lines != list(range(1, len(lines) + 1)):
        return "steps are missing or there twice"
    differing = [step for step, loss in found.items() if expected.get(step) != loss]
    return f"{len(differing)} losses differ, the first after step {differing[0]}" if differing else ""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own for the run (root), so that filling it harms nobody else."""
    (folder / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder / "disk")]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder / "disk")], check=True)


def prepare(folder: Path, settings: list[str]) -> None:
    """A small corpus, packed."""
    (folder / "corpus").mkdir()
    for index in range(120):
        text = " ".join(f"Note {index * 31 + line} says {line * index} of {line}." for line in range(40))
        (folder / "corpus" / f"{index:04d}.txt").write_text(text)
    config = load_config([*settings, f"data.dir={folder}/data"])
    for stage in (curate, order, pack):
        stage(config, serial_units)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="no network namespaces, no mounts, also as root")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # nodes and mounts are not left behind
    dice, reason = random.Random(options.seed), "asked for" if options.plain else available()
    kinds = list(ANYWHERE if reason else ANYWHERE | WITH_NETWORK | WITH_ROOT)
    plan = [kind for _ in range(-(-options.rounds // len(kinds))) for kind in dice.sample(kinds, len(kinds))]
    print(f"{options.rounds} rounds, seed {options.seed}; " + (f"plain: {reason}" if reason else "network of 3 hosts"))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        settings = [*SETTINGS, f"data.path={folder}/corpus"]
        prepare(folder, settings)
        if reason:
            (folder / "disk").mkdir()
        else:
            stack.enter_context(small_disk(folder))
        network = None if reason else stack.enter_context(Network("port", 3, 1000))
        nodes = stack.enter_context(Nodes(2, 1, network))
        disturbed, undisturbed = (Run(name, folder, nodes, settings) for name in ("disturbed", "undisturbed"))
        disturbed.start()
        rows, fine = rounds(Scene(disturbed, nodes, network, dice), plan[: options.rounds])
        show(rows)
        code = disturbed.stop() if fine else 1
        last = disturbed.step()
        print(f"{len(rows)} rounds, {last} steps, stopped with exit code {code}", flush=True)
        if not fine:
            return 1
        undisturbed.start()
        undisturbed.await_step(last, 3600.0)
        undisturbed.stop()
        wrong = compare(disturbed, undisturbed)
        print(f"losses of steps 1 to {last}: {wrong or 'equal to the undisturbed run to the last bit'}")
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

"""What ``benchmarks.chaos`` does to a run: one function a harm, which returns what exactly it did."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.netns import Network
from benchmarks.nodes import Nodes
from benchmarks.submitted import BOUND_SEC, Run
from trainers.checkpoint_folder import checkpoints_folder, complete_checkpoints


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
    try:
        with filler.open("wb", buffering=0) as file:
            while scene.run.log.read_text().count("no checkpoint after") == before and time.monotonic() < deadline:
                with suppress(OSError):
                    while True:
                        file.write(bytes(4096))
                time.sleep(0.01)
    finally:
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

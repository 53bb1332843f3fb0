"""The machines of a running cluster as they see each other: links, clocks, disks, versions (``sundog doctor``)."""

import os
import platform
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connection import connect
from cluster.wire import Disk, Receiver, bandwidth, clock_offset, disk, gpu_names
from conf.schema import ClusterConfig

LINK_SEC, DISK_SEC = 0.5, 0.5
ANSWER_SEC = 40.0  # for a machine's first answer: its worker starts, with the code
SECOND_SEC = 15.0  # for every further one


@dataclass(frozen=True)
class Machine:
    """One machine of the cluster."""

    host: str  # its name and address
    python: str
    ray: str
    cpus: float  # that Ray lends to ranks there
    gpus: float
    gpu_names: tuple[str, ...]  # that the machine's driver shows
    memory: int  # bytes
    clock_sec: float  # ahead of this machine's
    clock_error_sec: float
    rate: float | str | None  # bytes a second to the next machine, all sending at once; a text where it cannot be
    # reached, None where it is the only one
    disk: Disk | str  # of the folder; a text where it cannot be written


@dataclass(frozen=True)
class Silent:
    """A machine that Ray counts as alive and that does not answer."""

    host: str
    reason: str


class Probe:
    """Looks at the machine that it runs on."""

    def about(self, folder: str) -> dict[str, Any]:
        try:
            found: Disk | str = disk(Path(folder), DISK_SEC)
        except OSError as error:
            found = f"{folder}: {error.strerror or error}"
        return {
            "host": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})",
            "python": platform.python_version(),
            "ray": ray.__version__,
            "gpu_names": tuple(gpu_names()),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "disk": found,
        }

    def now(self) -> float:
        return time.time()

    def listen(self) -> int:
        return Receiver().port

    def send(self, host: str, port: int) -> float | str:
        try:
            return bandwidth(host, port, LINK_SEC)
        except OSError as error:
            return f"{host}: {error.strerror or error}"


def look(cluster: ClusterConfig, folder: str) -> list[Machine | Silent]:
    """Look at all live machines of the cluster at ``cluster.address``, ordered by address; the links form a ring.

    ``folder`` is where the run would write. It ends within about two minutes, whatever the machines do.

    Raises:
        ResourceError: no cluster answers there.
    """
    with connect(cluster):
        nodes = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeManagerAddress"], n["NodeID"]))
        probes: list[Any] = [_start(node["NodeID"]) for node in nodes]
        about = _answers([probe.about.remote(folder) for probe in probes], ANSWER_SEC)
        live = [index for index, answer in enumerate(about) if not isinstance(answer, str)]
        rates = dict.fromkeys(live) if len(live) < 2 else _rates(live, probes, nodes)
        return [
            _machine(about[index], probe, node, rates.get(index))
            for index, (probe, node) in enumerate(zip(probes, nodes, strict=True))
        ]


def _start(node: str) -> Any:
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(Probe).options(num_cpus=0, scheduling_strategy=place).remote()


def _answers(asked: list[Any], seconds: float) -> list[Any]:
    """What was asked of several machines, or a text for each that has not answered in time."""
    ray.wait(asked, num_returns=len(asked), timeout=seconds)
    found = []
    for one in asked:
        try:
            found.append(ray.get(one, timeout=0))
        except GetTimeoutError:
            found.append(f"no answer in {seconds:g} s")
        except RayError as error:
            found.append(str(error).strip().splitlines()[-1].strip())
    return found


def _rates(live: list[int], probes: list[Any], nodes: list[Any]) -> dict[int, float | str | None]:
    """The rate of the link from every live machine to the one after it."""
    ports = _answers([probes[index].listen.remote() for index in live], SECOND_SEC)
    following = [(live[(place + 1) % len(live)], ports[(place + 1) % len(live)]) for place in range(len(live))]
    sent = [
        probes[index].send.remote(nodes[other]["NodeManagerAddress"], port)
        for index, (other, port) in zip(live, following, strict=True)
        if isinstance(port, int)
    ]
    rates = iter(_answers(sent, SECOND_SEC))
    return {
        index: next(rates) if isinstance(port, int) else f"{nodes[other]['NodeManagerAddress']}: {port}"
        for index, (other, port) in zip(live, following, strict=True)
    }


def _machine(about: Any, probe: Any, node: dict[str, Any], rate: float | str | None) -> Machine | Silent:
    if isinstance(about, str):
        return Silent(f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", about)
    try:
        ahead, error = clock_offset(lambda: ray.get(probe.now.remote(), timeout=SECOND_SEC))
    except (RayError, GetTimeoutError):
        return Silent(about["host"], f"no further answer in {SECOND_SEC:g} s")
    lent = node["Resources"]
    return Machine(
        **about, cpus=lent.get("CPU", 0.0), gpus=lent.get("GPU", 0.0), clock_sec=ahead, clock_error_sec=error, rate=rate
    )

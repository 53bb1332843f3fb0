"""The machines of a running cluster as they see each other: links, clocks, disks, versions (``sundog doctor``)."""

import platform
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.connection import connect
from cluster.wire import Disk, Receiver, bandwidth, clock_offset, disk
from conf.schema import ClusterConfig

LINK_SEC, DISK_SEC = 0.5, 0.5


@dataclass(frozen=True)
class Machine:
    """One machine of the cluster."""

    host: str
    python: str
    ray: str
    clock_sec: float  # ahead of this machine's
    clock_error_sec: float
    rate: float | None  # bytes a second to the next machine, all sending at once; None: no link
    disk: Disk | str  # of the folder; a text where it cannot be written


class Probe:
    """Looks at the machine that it runs on."""

    def about(self, folder: str) -> tuple[str, str, str, Disk | str]:
        try:
            found: Disk | str = disk(Path(folder), DISK_SEC)
        except OSError as error:
            found = f"{folder}: {error.strerror or error}"
        return socket.gethostname(), platform.python_version(), ray.__version__, found

    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def now(self) -> float:
        return time.time()

    def listen(self) -> int:
        return Receiver().port

    def send(self, host: str, port: int) -> float | None:
        try:
            return bandwidth(host, port, LINK_SEC)
        except OSError:
            return None


def look(cluster: ClusterConfig, folder: str) -> list[Machine]:
    """Look at all live machines of the cluster at ``cluster.address``, ordered by address; the links form a ring.

    ``folder`` is where the run would write.

    Raises:
        ResourceError: no cluster answers there.
    """
    with connect(cluster):
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
        place = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        actor = ray.remote(Probe).options
        probes: list[Any] = [actor(num_cpus=0, scheduling_strategy=one).remote() for one in place]
        addresses = ray.get([probe.address.remote() for probe in probes])
        order = sorted(range(len(nodes)), key=lambda index: (addresses[index], nodes[index]))
        probes, addresses = [probes[index] for index in order], [addresses[index] for index in order]
        about = ray.get([probe.about.remote(folder) for probe in probes])
        clocks = [clock_offset(lambda probe=probe: ray.get(probe.now.remote())) for probe in probes]
        rates: list[float | None] = [None] * len(probes)
        if len(probes) > 1:
            ports = ray.get([probe.listen.remote() for probe in probes])
            following = [(index + 1) % len(probes) for index in range(len(probes))]
            rates = ray.get([p.send.remote(addresses[n], ports[n]) for p, n in zip(probes, following, strict=True)])
        return [
            Machine(host, python, version, *clock, rate, found)
            for (host, python, version, found), clock, rate in zip(about, clocks, rates, strict=True)
        ]

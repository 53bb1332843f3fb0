"""A Ray cluster of several nodes on this machine, each with a raylet of its own: nodes that can be killed and replaced.

Node 0 is the head; it runs jobs and no ranks. With a network (``benchmarks.netns``, root) every node has an address and
a link of its own; the calling thread then lives on the head's side of it. Without, all share the loopback device.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from benchmarks.netns import Network, address, enter
from cluster.job_client import connect_jobs
from cluster.jobs import JobServer
from cluster.local_head import free_port
from conf.errors import ResourceError

START_TIMEOUT_SEC = 180.0
RAYLET_SEC = 15.0  # from a node's start until its raylet runs, at most
HEALTH = {  # how soon Ray calls a node dead that does not answer: about 5 s, also on a busy machine
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "4",
}
OBJECT_STORE_BYTES = 80 * 2**20


class Nodes:
    """A head and ``count`` nodes of ``cpus`` CPUs; a context manager that leaves nothing behind."""

    def __init__(self, count: int, cpus: int, network: Network | None = None) -> None:
        self.count, self._cpus, self._network = count, cpus, network
        self._folder = Path(tempfile.mkdtemp(prefix="sd-", dir="/tmp"))  # short: there are sockets in it
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._starts, self._last_error = 0, ""
        self._started: dict[int, float] = {}
        self._port, dashboard = free_port(), free_port()
        self.url = f"http://{self._ip(0)}:{dashboard}"
        self._dashboard = dashboard
        self.environment = {**os.environ, **HEALTH, "OMP_NUM_THREADS": "1"}
        own = str(Path(sys.executable).parent)  # a job's command says `python`
        self.environment["PATH"] = os.pathsep.join([own, self.environment.get("PATH", os.defpath)])
        if network is not None:
            self.environment["GLOO_SOCKET_IFNAME"] = "fab0"

    @property
    def address(self) -> str:
        return f"{self._ip(0)}:{self._port}"

    def _ip(self, index: int) -> str:
        return address(index) if self._network is not None else "127.0.0.1"

    def __enter__(self) -> Self:
        try:
            if self._network is not None:
                enter(self._network.seat.paths[0])
            self.start(0)
            self.await_nodes(0)
            for index in range(1, self.count + 1):
                self.start(index)
            self.await_nodes(self.count)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for index in sorted(self._running, reverse=True):
            self.kill(index)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, index: int) -> None:
        """Start a node, again if it was killed; it joins by itself."""
        self._starts += 1
        self._started[index] = time.monotonic()
        folder = self._folder / f"{index}-{self._starts}"
        options = [f"--node-ip-address={self._ip(index)}", "--dashboard-agent-listen-port=0", "--block"]
        options += [f"--object-store-memory={OBJECT_STORE_BYTES}", f"--temp-dir={folder}", "--disable-usage-stats"]
        if index == 0:
            options += ["--head", f"--port={self._port}", "--num-cpus=0", "--include-dashboard=true"]
            options += [f"--dashboard-host={self._ip(0)}", f"--dashboard-port={self._dashboard}"]
        else:
            options += [f"--address={self.address}", f"--num-cpus={self._cpus}"]
        paths = self._network.seat.paths if self._network is not None else ()
        self._running[index] = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", *options],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=(self._folder / f"{index}-{self._starts}.log").open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=(lambda: enter(paths[index])) if paths else None,
        )

    def running(self, index: int) -> bool:
        """Whether a node's raylet lives."""
        return index in self._running and bool(self.raylet(index))

    def raylet(self, index: int) -> int:
        """The raylet's process id, or 0."""
        return next((p.pid for p in self.processes(index) if p.name() == "raylet"), 0)

    def processes(self, index: int) -> list[psutil.Process]:
        """All live processes of a node, ranks and drivers of jobs included."""
        with suppress(psutil.NoSuchProcess):
            top = psutil.Process(self._running[index].pid)
            return [p for p in (top, *top.children(recursive=True)) if p.status() != psutil.STATUS_ZOMBIE]
        return []

    def kill(self, index: int) -> None:
        """Kill all processes of a node at once, as a power cut does."""
        found = self.processes(index)
        for process in found:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP)  # none may react to the end of another
        for process in [*found, *self.processes(index)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._running.pop(index).wait()

    def restore(self) -> list[int]:
        """Start every node again that does not run, though it was started a while ago; return which."""
        settled = time.monotonic() - RAYLET_SEC
        dead = [n for n in range(1, self.count + 1) if not self.running(n) and self._started[n] < settled]
        for index in dead:
            if index in self._running:
                self.kill(index)
            self.start(index)
        return dead

    def repair(self) -> list[int]:
        """Restore nodes until the whole cluster is alive: one may die of a harm only later; return which it were."""
        replaced: list[int] = []

        def whole() -> bool:
            replaced.extend(self.restore())
            return self._cpus_alive() == self.count * self._cpus

        self._await(f"{self.count} nodes", whole)
        return replaced

    def await_nodes(self, count: int) -> None:
        """Wait until the cluster has exactly ``count`` live nodes besides the head."""
        self._await(f"{count} nodes", lambda: self._cpus_alive() == count * self._cpus)

    def _cpus_alive(self) -> float:
        try:
            return JobServer(connect_jobs(self.url), {}, None).total("CPU")
        except Exception as error:  # the dashboard is starting: Ray raises many kinds
            self._last_error = str(error)
            return -1.0

    def _await(self, what: str, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SEC
        while not condition():
            if time.monotonic() > deadline:
                logs = "".join(path.read_text()[-800:] for path in sorted(self._folder.glob("*.log")))
                raise ResourceError(
                    "nodes", what, f"not there in {START_TIMEOUT_SEC:g} s: {self._last_error} {logs}", "look at the log"
                )
            time.sleep(0.3)

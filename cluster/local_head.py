"""A Ray cluster of this machine, for the length of a block, in processes that never outlive this one."""

import http.client
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.environment import code_on_path
from conf.errors import ResourceError
from conf.schema import ClusterConfig

START_TIMEOUT_SEC = 120.0
STOP_TIMEOUT_SEC = 10.0  # for Ray to shut down in order: what a command that got a signal makes its user wait
KILL_TIMEOUT_SEC = 30.0
POLL_SEC = 0.2
TEMP_PREFIX = "sundog-"
LOG = "keeper.log"

Keeper = subprocess.Popen[str]


@dataclass(frozen=True)
class Head:
    """The address of a local cluster, and of its job server (empty: none)."""

    address: str
    dashboard_url: str


@contextmanager
def local_head(cluster: ClusterConfig, *, dashboard: bool) -> Iterator[Head]:
    """Start a one-node cluster, with a job server if ``dashboard``; stop it at the end of the block.

    Raises:
        ResourceError: it does not come up within 2 minutes.
    """
    port = free_port() if dashboard else 0
    size = cluster.object_store_mb * 2**20
    with temporary_folder() as folder, code_on_path(), (Path(folder) / LOG).open("w") as log:
        command = [sys.executable, "-m", "cluster.keeper", folder, str(size), str(port)]
        keeper = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        )
        try:
            deadline = time.monotonic() + START_TIMEOUT_SEC
            address = _address(keeper, deadline, folder)
            while port and not _answers(port):
                if time.monotonic() > deadline:
                    raise _did_not_start(folder)
                time.sleep(POLL_SEC)
            yield Head(address, f"http://127.0.0.1:{port}" if port else "")
        finally:
            _stop(keeper)


def _address(keeper: Keeper, deadline: float, folder: str) -> str:
    assert keeper.stdout is not None, "the keeper was started with a pipe"
    while time.monotonic() < deadline:
        if select.select([keeper.stdout], [], [], POLL_SEC)[0]:
            if line := keeper.stdout.readline().strip():
                return line
            break  # its output has ended, so it has
    raise _did_not_start(folder)


def _did_not_start(folder: str) -> ResourceError:
    lines = (Path(folder) / LOG).read_text(errors="replace").strip().splitlines()
    said = " / ".join(line.strip() for line in lines[-3:])
    return ResourceError("cluster", "local", f"Ray did not start: {said or 'it said nothing'}", "sundog doctor")


def _stop(keeper: Keeper) -> None:
    assert keeper.stdin is not None, "the keeper was started with a pipe"
    keeper.stdin.close()
    try:
        keeper.wait(STOP_TIMEOUT_SEC)
    except subprocess.TimeoutExpired:
        keeper.kill()  # its children end with it: Ray binds them to their parent
        keeper.wait(KILL_TIMEOUT_SEC)


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port of ``host`` that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def _answers(port: int) -> bool:
    """Return whether a job server answers with any status; 401 shows one that wants its token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield a folder for one Ray session, with a path short enough for the sockets in it; also clear dead ones.

    A folder stays behind only if everything was killed at once; the next command finds the dead process id in its name.
    """
    base = Path("/tmp") if os.access("/tmp", os.W_OK) else Path(tempfile.gettempdir())
    for old in base.glob(f"{TEMP_PREFIX}[0-9]*-*"):
        pid = old.name.removeprefix(TEMP_PREFIX).partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(old, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"{TEMP_PREFIX}{os.getpid()}-", dir=base)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True

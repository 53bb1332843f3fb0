"""Connections: shared, refused, and never outlived by a process."""

import http.server
import json
import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import connection, local_head
from cluster.connection import Connection, connect, split_address
from cluster.local_head import TEMP_PREFIX, temporary_folder
from conf.errors import EXIT_TERMINATED, ResourceError
from conf.schema import ClusterConfig
from tests.helpers.processes import clean_environment, descendants, survivors

ROOT = Path(__file__).resolve().parents[3]
GONE_TIMEOUT_SEC = 30.0


@pytest.fixture
def mute_server() -> Iterator[int]:
    """A port that accepts connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield server.getsockname()[1]


def test_a_nested_connection_is_shared(ray_cluster: Connection, cluster: ClusterConfig) -> None:
    import ray

    with connect(cluster) as inner:
        assert inner.address == ray_cluster.address
    assert ray.is_initialized()


def test_a_connection_leaves_signal_handlers_alone() -> None:
    script = """
import signal
from cluster.connection import connect
from conf.schema import ClusterConfig
received = []
def mine(signum, frame): received.append(signum)
signal.signal(signal.SIGTERM, mine)
interrupt = signal.getsignal(signal.SIGINT)
with connect(ClusterConfig(object_store_mb=128)):
    import os, ray
    os.kill(os.getpid(), signal.SIGTERM)
    assert received == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGINT) is interrupt
    @ray.remote
    def token(): return os.environ["RAY_AUTH_MODE"], len(os.environ["RAY_AUTH_TOKEN"])
    assert ray.get(token.remote()) == ("token", 64)
assert signal.getsignal(signal.SIGTERM) is mine
assert not ray.is_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean_environment(HOME="/nonexistent"),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_a_signal_handler_raises_passes_through_ray() -> None:
    script = """
import os, signal, threading
from cluster.connection import connect
from conf.schema import ClusterConfig
import ray
class Terminated(BaseException): pass
def mine(signum, frame): raise Terminated
signal.signal(signal.SIGTERM, mine)
try:
    with connect(ClusterConfig(object_store_mb=128)):
        @ray.remote
        def for_ever():
            threading.Event().wait()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        ray.get(for_ever.remote(), timeout=60)
except Terminated:
    print("terminated")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "terminated\n"), done.stderr


def test_ray_imported_first_is_an_error_not_an_open_cluster() -> None:
    script = """
import ray
from cluster.connection import connect
from conf.schema import ClusterConfig
with connect(ClusterConfig()):
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "import cluster.connection before ray" in done.stderr


def refusal(address: str) -> ResourceError:
    """Connect to ``address`` in a thread of this test, with Ray not initialised, and return the error."""
    script = "import sys, pickle\nfrom cluster import connection\nconnection.PROBE_TIMEOUT_SEC = 5.0\n" + (
        "try: connection.check_address(sys.argv[1])\nexcept Exception as e: sys.stdout.buffer.write(pickle.dumps(e))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, address], cwd=ROOT, capture_output=True, timeout=60, check=True
    )
    import pickle

    return pickle.loads(done.stdout)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379", "ray://127.0.0.1:1"])
def test_a_dead_address_is_refused(address: str) -> None:
    error = refusal(address)
    assert isinstance(error, ResourceError)
    assert (error.field, error.value) == ("cluster.address", address)
    assert "ray start --head" in error.fix


def test_a_server_that_is_no_ray_cluster_is_refused(mute_server: int) -> None:
    error = refusal(f"127.0.0.1:{mute_server}")
    assert isinstance(error, ResourceError)
    assert "no Ray handshake" in error.rule


def test_a_dashboard_is_no_cluster_address() -> None:
    with socketserver.TCPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = f"127.0.0.1:{server.server_address[1]}"
        errors = [refusal(where), refusal(f"http://{where}")]
        server.shutdown()
    for error in errors:
        assert "an HTTP address" in error.rule
        assert "6379" in error.fix


@pytest.mark.parametrize(
    ("said", "rule", "fix"),
    [
        ("W gcs_client.cc:210: RPC error: InvalidAuthToken: Authentication token", "refuses", "RAY_AUTH_TOKEN"),
        ("C raylet_ipc_client.cc:85: Failed to connect to socket at address:/r\n_start", "none of its", "submit"),
        ("ray.exceptions.AuthenticationError: RAY_AUTH_TOKEN_PATH is set but\n", "is set but", "RAY_AUTH_TOKEN"),
        ("first\nlast\n", "last", "ray start --head"),
    ],
)
def test_what_ray_says_becomes_a_reason_and_its_fix(said: str, rule: str, fix: str) -> None:
    error = connection._refusal("10.0.0.1:6379", said, late=False)
    assert rule in error.rule
    assert fix in error.fix


def test_a_cluster_with_another_token_is_refused(ray_cluster: Connection) -> None:
    script = f"""
from cluster import connection
from conf.schema import ClusterConfig
connection.PROBE_TIMEOUT_SEC = 1000.0  # it is refused at once
with connection.connect(ClusterConfig(address={ray_cluster.address!r})):
    pass
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean_environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN="f" * 64),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "ResourceError" in done.stderr
    assert "refuses this authentication token" in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_a_cluster_without_authentication_is_refused_in_words() -> None:
    """Ray starts no actor there of a client that sends a token, and says only that it was cancelled."""
    client = """
import sys
from cluster.connection import connect
from conf.schema import ClusterConfig
with connect(ClusterConfig(address=sys.argv[1])):
    print("connected")
"""
    script = f"""
import subprocess, sys
from cluster.connection import connect
from conf.schema import ClusterConfig
from tests.helpers.processes import clean_environment
with connect(ClusterConfig(object_store_mb=128)) as connection:
    for mode in ({{}}, {{"RAY_AUTH_MODE": "disabled"}}):
        environment = clean_environment(HOME="/nonexistent", **mode)
        command = [sys.executable, "-c", {client!r}, connection.address]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        print((done.stdout + done.stderr).strip().splitlines()[-1])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=clean_environment(RAY_AUTH_MODE="disabled", PYTHONPATH=str(ROOT)),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refused, accepted = done.stdout.splitlines()
    assert "RAY_AUTH_MODE=disabled" in refused
    assert accepted == "connected"


@pytest.mark.parametrize(("job", "mode"), [({"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"}, "disabled"), ({}, "token")])
def test_a_job_keeps_the_mode_of_its_cluster(job: dict[str, str], mode: str) -> None:
    command = [sys.executable, "-c", "import os, cluster; print(os.environ['RAY_AUTH_MODE'])"]
    environment = clean_environment(HOME="/nonexistent", **job)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == mode


def test_a_running_cluster_gets_the_code(ray_cluster: Connection, tmp_path: Path) -> None:
    script = f"""
from cluster.connection import connect
from cluster.gang import Gang
from conf.schema import ClusterConfig
c = ClusterConfig(address={ray_cluster.address!r}, ranks=2, cpus_per_rank=0.5)
with connect(c) as connection, Gang(c) as gang:
    assert not connection.local
    print(gang.run("tests.helpers.ranks:report", None)[1]["cwd"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == str(tmp_path), done.stderr


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.1:6379", ("10.0.0.1", 6379)),
        ("ray://head:10001", ("head", 10001)),
        ("http://head:8265/", ("head", 8265)),
        ("[::1]:6379", ("::1", 6379)),
        ("auto", ("", 0)),
    ],
)
def test_addresses_are_split(address: str, expected: tuple[str, int]) -> None:
    assert split_address(address) == expected


@pytest.mark.parametrize("address", ["head", "head:port", ":6379", "ray://"])
def test_malformed_addresses_are_refused(address: str) -> None:
    with pytest.raises(ResourceError, match="HOST:PORT"):
        split_address(address)


def test_the_folder_of_a_killed_command_is_removed() -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(30)
    with temporary_folder() as folder:
        old = Path(folder).parent / f"{TEMP_PREFIX}{dead.pid}-left"
        old.mkdir()
        with temporary_folder() as other:
            assert not old.exists()
            assert Path(folder).exists()
        assert not Path(other).exists()


def start_driver(*arguments: str) -> tuple["subprocess.Popen[str]", dict[str, Any], list[psutil.Process]]:
    driver = subprocess.Popen(
        [sys.executable, "-m", "tests.helpers.driver", *arguments],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    watchdog = threading.Timer(120, driver.kill)
    watchdog.start()
    assert driver.stdout is not None
    line = driver.stdout.readline()
    watchdog.cancel()
    assert line, "the driver ended before its ranks ran"
    said = json.loads(line)
    try:
        processes = descendants(driver.pid)
    except psutil.NoSuchProcess:
        processes = []
    return driver, said, processes


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_driver_that_is_killed(signum: signal.Signals) -> None:
    driver, said, processes = start_driver()
    assert set(said["ranks"]) < {process.pid for process in processes}
    assert len(processes) > 5
    if signum == signal.SIGTERM:
        os.killpg(driver.pid, signum)  # as `timeout` and service managers do; Ray is not in the group
    else:
        driver.send_signal(signum)
    code = driver.wait(GONE_TIMEOUT_SEC)
    assert survivors(processes, GONE_TIMEOUT_SEC) == []
    if signum == signal.SIGTERM:
        assert code == EXIT_TERMINATED
    assert list(Path("/tmp").glob(f"{TEMP_PREFIX}{driver.pid}-*")) == []


def test_no_process_outlives_a_driver_that_raises() -> None:
    driver, said, processes = start_driver("raise")
    assert driver.wait(GONE_TIMEOUT_SEC) == 1
    assert survivors(processes, GONE_TIMEOUT_SEC) == []
    assert not any(psutil.pid_exists(pid) for pid in said["ranks"])


@pytest.mark.parametrize("program", ["input()", "import time; time.sleep(600)"])
def test_a_keeper_ends_or_is_killed(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_head, "STOP_TIMEOUT_SEC", 0.5)
    pipe = subprocess.PIPE
    keeper = subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stderr=subprocess.DEVNULL, text=True)
    local_head._stop(keeper)
    assert keeper.returncode is not None

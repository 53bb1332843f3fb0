"""The connection to a Ray cluster: a local one that lives as long as the command, or one that runs already."""

import http.client
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

import ray

from cluster.environment import CODE_ROOT, inside_job, is_checkout, token_is_invented
from cluster.local_head import local_head
from cluster.upload import runtime_environment
from conf.errors import EXIT_TERMINATED, ResourceError
from conf.schema import ClusterConfig

TCP_TIMEOUT_SEC = 5.0
HTTP_TIMEOUT_SEC = 2.0
PROBE_TIMEOUT_SEC = 30.0  # Ray's own imports take seconds on a busy machine
PROBE_POLL_SEC = 0.2
SAID_BYTES = 2**16
# What Ray's native client says.
TOKEN_REFUSED, TOKEN_UNREADABLE, NO_RAYLET = "InvalidAuthToken", "AuthenticationError", "Failed to connect to socket"
OPEN_FIX = "RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN for it and for clients, or RAY_AUTH_MODE=disabled for clients too"
TOKEN_FIX = "export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
PROBE = "import sys, ray; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False); ray.cluster_resources()"


@dataclass(frozen=True)
class Connection:
    """A live connection: the cluster's address, its dashboard (empty: none), and whether it ends with this process."""

    address: str
    dashboard_url: str
    local: bool


@contextmanager
def connect(
    cluster: ClusterConfig, *, dashboard: bool = False, runtime_env: dict[str, Any] | None = None
) -> Iterator[Connection]:
    """Connect to ``cluster.address``, or start a cluster on this machine and stop it at the end of the block.

    With an empty address, ``RAY_ADDRESS`` decides, as everywhere in Ray (a Ray job finds its cluster so). Inside
    another ``connect`` the connection is shared. The caller's SIGTERM handler stays in force, although Ray installs its
    own.

    Raises:
        ResourceError: the address does not answer, is no Ray cluster or refuses this client (within about half a
            minute), or the local cluster does not start.
    """
    if ray.is_initialized():
        yield Connection(ray.get_runtime_context().gcs_address, "", local=False)
        return
    address = cluster.address or os.environ.get("RAY_ADDRESS", "")
    with ExitStack() as stack:
        stack.enter_context(_callers_signal_handlers())
        if address in ("", "local"):
            yield stack.enter_context(_local_cluster(cluster, dashboard, runtime_env))
        else:
            yield stack.enter_context(_running_cluster(address, runtime_env))


@contextmanager
def _local_cluster(cluster: ClusterConfig, dashboard: bool, runtime_env: dict[str, Any] | None) -> Iterator[Connection]:
    if not os.environ.get("RAY_AUTH_MODE"):
        raise ResourceError(
            "RAY_AUTH_MODE",
            "",
            "Ray was imported before Sundog's cluster package, which must settle Ray's authentication first",
            "import cluster.connection before ray, or export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        )
    with local_head(cluster, dashboard=dashboard) as head, _session(head.address, runtime_env):
        yield Connection(head.address, head.dashboard_url, local=True)


@contextmanager
def _running_cluster(address: str, runtime_env: dict[str, Any] | None) -> Iterator[Connection]:
    environment = runtime_env
    if not inside_job():
        check_address(address)
        if environment is None and is_checkout():
            environment = runtime_environment(CODE_ROOT)
    with _session(address, environment) as url:
        yield Connection(ray.get_runtime_context().gcs_address, url, local=False)


@contextmanager
def _session(address: str, runtime_env: dict[str, Any] | None) -> Iterator[str]:
    """Connect this process; yield the dashboard's URL (empty: none)."""
    try:
        context = _init(address=address, runtime_env=runtime_env)
    except (RuntimeError, OSError, ValueError) as error:
        ray.shutdown()
        raise _no_cluster(address, str(error)) from error
    try:
        yield f"http://{context.dashboard_url}" if context.dashboard_url else ""
    finally:
        ray.shutdown()


def _init(**arguments: Any) -> Any:
    """``ray.init`` without its log lines, and without the SIGTERM handler that it installs."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return ray.init(logging_level=logging.ERROR, log_to_driver=False, **arguments)
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _callers_signal_handlers() -> Iterator[None]:
    """Bring what the caller's SIGTERM handler raises through Ray, and exit with 143 where there is no handler.

    Ray's native calls pass on KeyboardInterrupt alone from a handler: they drop the code of SystemExit and swallow any
    other exception. And the default action would end the process before it can disconnect.
    """
    before = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
        yield
        return
    raised: list[BaseException] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        try:
            if not callable(before):
                sys.exit(EXIT_TERMINATED)
            before(signum, frame)
        except BaseException as error:
            raised.append(error)
            raise KeyboardInterrupt from error

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    except KeyboardInterrupt:
        if raised:
            raise raised[0] from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def check_address(address: str) -> None:
    """Raise ResourceError unless a Ray cluster answers at ``address`` within about half a minute.

    Ray itself waits for minutes on an address that does not answer, and its native client may end the process. So the
    port is tried first, and the handshake runs in a process of its own that can be killed.
    """
    if address.startswith(("http://", "https://")):
        raise _http(address)
    host, port = split_address(address)
    if host:
        try:
            socket.create_connection((host, port), TCP_TIMEOUT_SEC).close()
        except OSError as error:
            raise _no_cluster(address, error.strerror or str(error)) from None
        if _speaks_http(host, port):
            raise _http(address)
    code, said = _handshake(address, dict(os.environ))
    if code != 0:
        raise _refusal(address, said, late=code is None)
    if token_is_invented():
        rule = "that cluster asks for no token, and starts no actors of a client that sends one"
        raise ResourceError("cluster.address", address, rule, OPEN_FIX)


def takes_any_client(address: str) -> bool:
    """Whether the cluster there lets in a client whose token nobody has given it: one without authentication does."""
    others = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN_PATH"}
    return _handshake(address, others | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)})[0] == 0


def _handshake(address: str, environment: dict[str, str]) -> tuple[int | None, str]:
    """The exit code of a process that connects (None: it was late), and what it wrote to its standard error."""
    with tempfile.TemporaryFile() as said:
        command = [sys.executable, "-c", PROBE, address]
        probe = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=said)
        try:
            code = _watch(probe, said)
        finally:
            probe.kill()
            probe.wait()
        said.seek(0)
        return code, said.read().decode(errors="replace")


def _watch(probe: "subprocess.Popen[bytes]", said: IO[bytes]) -> int | None:
    """The probe's exit code; None: it has had its time, or repeats that its token is refused, as it would for ever."""
    deadline = time.monotonic() + PROBE_TIMEOUT_SEC
    while time.monotonic() < deadline and TOKEN_REFUSED.encode() not in os.pread(said.fileno(), SAID_BYTES, 0):
        try:
            return probe.wait(PROBE_POLL_SEC)
        except subprocess.TimeoutExpired:
            continue
    return None


def _refusal(address: str, said: str, *, late: bool) -> ResourceError:
    """What the probe's standard error means."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if TOKEN_REFUSED in said:
        rule, fix = "a Ray cluster answers there, and refuses this authentication token", f"{TOKEN_FIX} as its head has"
        return ResourceError("cluster.address", address, rule, fix)
    if TOKEN_UNREADABLE in said:
        reason = next((line for line in reversed(lines) if TOKEN_UNREADABLE in line), "").partition(TOKEN_UNREADABLE)[2]
        return ResourceError("cluster.address", address, reason.strip(": ")[:120], f"{TOKEN_FIX} as its head has")
    if NO_RAYLET in said:
        rule = "a Ray cluster answers there, but this machine is none of its nodes"
        fix = "`sundog submit --address http://HOST:8265 COMMAND` runs it there; `ray start --address` joins it"
        return ResourceError("cluster.address", address, rule, fix)
    if late:
        return _no_cluster(address, f"no Ray handshake in {PROBE_TIMEOUT_SEC:g} s")
    return _no_cluster(address, lines[-1] if lines else "the probe said nothing")


def _http(address: str) -> ResourceError:
    rule = "an HTTP address, such as a dashboard's; a cluster's own is HOST:PORT of `ray start`"
    return ResourceError("cluster.address", address, rule, "port 6379 where `ray start` was told no other")


def _speaks_http(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=HTTP_TIMEOUT_SEC)
    try:
        connection.request("GET", "/")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True


def split_address(address: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT, ray://HOST:PORT or http://HOST:PORT; an empty host for ``auto``.

    Raises:
        ResourceError: it is neither.
    """
    if address == "auto":
        return "", 0
    host, colon, port = (
        address.partition("://")[2].rstrip("/").rpartition(":") if "://" in address else (address.rpartition(":"))
    )
    if not colon or not port.isdigit() or not host:
        raise ResourceError(
            "cluster.address", address, "HOST:PORT, ray://HOST:PORT or auto", "cluster.address=HOST:6379"
        )
    return host.strip("[]"), int(port)


def _no_cluster(address: str, reason: str) -> ResourceError:
    return ResourceError(
        "cluster.address",
        address,
        f"no Ray cluster answers there: {reason[:300]}",
        "`ray start --head` on that machine, the right address, or cluster.address='' for a local cluster",
    )

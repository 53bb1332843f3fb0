"""An ASGI application on Ray Serve: checked, started, watched, shut down."""

import errno
import http.client
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from cluster.replica import Size, deployment
from conf.errors import ResourceError, SundogError
from conf.serving import ServeConfig

NAME = "sundog"
SECRETS = ("SUNDOG_API_TOKEN",)  # handed to replicas, never in their printed settings
START_TIMEOUT_SEC = 300.0
WATCH_SEC = 2.0
POLL_SEC = 0.1
ALL_INTERFACES = ("0.0.0.0", "::", "")


class ServingFailed(SundogError):
    """The application could not be built, or did not come up or stay up."""


@contextmanager
def serving(
    config: ServeConfig,
    factory: str,
    *,
    follower: str = "",
    cpus: float = 1.0,
    gpus: float = 0.0,
    start_timeout_sec: float = START_TIMEOUT_SEC,
    cluster_ends: bool = False,
) -> Iterator[str]:
    """Serve ``factory(model, settings)`` (a dotted name) on the connected cluster; yield the URL; then remove it.

    ``settings`` are the fields of ``config``. ``cpus`` and ``gpus`` are for one rank of a replica; of several
    (``config.engine.ranks``) those other than 0 run ``follower(settings)``. Afterwards Ray Serve itself is shut down
    unless other applications run on it, or the cluster ends anyway (``cluster_ends``).

    Raises:
        ResourceError: the port is in use or not ours to bind, or the replicas cannot fit.
        SundogError: what the factory raised, as it was raised.
        ServingFailed: the factory raised anything else, or the application is not up within ``start_timeout_sec``.
    """
    _check_port(config)
    ranks = config.engine.ranks
    _check_supply(config.replicas, cpus * ranks, gpus * ranks)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    settings = {**asdict(config), "model": str(Path(config.model).absolute())}
    application = deployment(
        factory,
        settings["model"],
        settings,
        {name: os.environ[name] for name in SECRETS if name in os.environ},
        replicas=_replicas(config),
        admitted=config.max_concurrent + config.max_queue,
        drain_sec=config.drain_sec,
        size=Size(ranks, cpus, gpus, follower),
    )
    try:
        _start(config, application, time.monotonic() + start_timeout_sec)
        host = "127.0.0.1" if config.host in ALL_INTERFACES else config.host
        yield f"http://{f'[{host}]' if ':' in host else host}:{config.port}"
    finally:
        _remove(cluster_ends)


def _replicas(config: ServeConfig) -> dict[str, Any]:
    if not config.max_replicas:
        return {"num_replicas": config.replicas}
    scale = {"min_replicas": config.replicas, "max_replicas": config.max_replicas}
    return {"autoscaling_config": {**scale, "target_ongoing_requests": config.max_concurrent}}


def _remove(cluster_ends: bool) -> None:
    if NAME in serve.status().applications:
        serve.delete(NAME)
    if not cluster_ends and not serve.status().applications:
        serve.shutdown()


def serve_until(stop: Callable[[], int]) -> None:
    """Return when ``stop()`` is true; look every other second whether the application still runs.

    Raises:
        ServingFailed: Ray Serve has given it up.
    """
    pause, look = threading.Event(), time.monotonic() + WATCH_SEC
    while not stop():
        pause.wait(POLL_SEC)
        if time.monotonic() > look:
            look = time.monotonic() + WATCH_SEC
            state = serve.status().applications.get(NAME)
            if state is None or state.status == ApplicationStatus.DEPLOY_FAILED:
                raise ServingFailed("serve", "", state.message if state else "Ray Serve was shut down from outside")


def _check_port(config: ServeConfig) -> None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            config.host or None, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is no reason
            probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            rule, fix = "the port is in use", f"serve.port={config.port + 1}, or stop what listens there"
        else:
            rule, fix = f"cannot listen there: {error.strerror or error}", "another serve.host or serve.port"
        raise ResourceError("serve.port", f"{config.host}:{config.port}", rule, fix) from None


def _check_supply(replicas: int, cpus: float, gpus: float) -> None:
    total = ray.cluster_resources()
    for kind, need in (("CPU", cpus * replicas), ("GPU", gpus * replicas)):
        if need > total.get(kind, 0):
            raise ResourceError(
                "serve.replicas",
                replicas,
                f"they need {need:g} {kind}, the cluster has {total.get(kind, 0):g}",
                "fewer replicas, or a bigger cluster",
            )


def _start(config: ServeConfig, application: Any, deadline: float) -> None:
    quiet = LoggingConfig(log_level="ERROR", enable_access_log=False)
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        http_options=HTTPOptions(host=config.host, port=config.port),
        logging_config=quiet,
    )
    handle = _run(application, deadline)
    failure, trace = handle.startup.remote().result(timeout_s=max(deadline - time.monotonic(), 1.0))
    if failure is not None:
        raise failure
    if trace:
        raise ServingFailed("serve", "", trace.strip().splitlines()[-1] + "\n" + trace)
    while not _accepts(config):
        if time.monotonic() > deadline:
            raise ServingFailed("serve", "", "the HTTP proxy does not accept connections", "look at `serve status`")
        time.sleep(POLL_SEC)


def _run(application: Any, deadline: float) -> Any:
    """Deploy and wait, but not for ever: Ray's own call has no bound, so it waits in a thread."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(serve.run(application, name=NAME, route_prefix="/"))
        except (RayError, RayServeException, RuntimeError, ValueError) as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True, name="serve-run")
    thread.start()
    while thread.is_alive() and time.monotonic() < deadline:
        thread.join(POLL_SEC)
    if not outcome:
        state = serve.status().applications.get(NAME)
        reason = state.message if state and state.message else "no replica became ready in time"
        raise ServingFailed("serve", "", reason, "look at `serve status` and the replica logs of Ray")
    if isinstance(outcome[0], BaseException):
        raise ServingFailed("serve", "", str(outcome[0]).strip()) from outcome[0]
    return outcome[0]


def _accepts(config: ServeConfig) -> bool:
    """Return whether the proxy answers HTTP and has learnt of the application (it answers 404 or 503 before)."""
    host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    connection = http.client.HTTPConnection(host, config.port, timeout=5)
    try:
        connection.request("GET", "/-/routes")
        response = connection.getresponse()
        return response.status == 200 and f'"{NAME}"' in response.read().decode()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()

"""Serving a tiny application: streams, statuses, disconnects, failures to build, and ports."""

import http.client
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.local_head import free_port
from cluster.serving import ServingFailed, serve_until, serving
from conf.errors import DataError, ResourceError
from conf.serving import ServeConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")
APPS = "tests.helpers.apps"
CPUS = 0.25


@pytest.fixture(scope="module")
def url(ray_cluster: object) -> Iterator[str]:
    config = ServeConfig(model="a/model", port=free_port(), max_concurrent=1, max_queue=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUNDOG_API_TOKEN", "s3cret")
        with serving(config, f"{APPS}:build_app", cpus=CPUS) as address:
            yield address


def test_the_factory_gets_model_settings_and_token(url: str) -> None:
    answer = httpx.get(f"{url}/settings", timeout=30).json()
    assert answer == {"model": str(Path("a/model").absolute()), "port": int(url.rpartition(":")[2]), "token": "s3cret"}


def test_statuses_and_headers_pass_through(url: str) -> None:
    busy = httpx.get(f"{url}/busy", timeout=30)
    assert (busy.status_code, busy.text, busy.headers["retry-after"]) == (429, "full", "1")
    assert httpx.get(f"{url}/nowhere", timeout=30).status_code == 404


def test_a_stream_is_not_held_back(url: str) -> None:
    with httpx.stream("GET", f"{url}/stream/one", timeout=30) as response:
        lines = response.iter_lines()
        assert next(lines) == "data: first"  # the application waits for the gate, so nothing else can have been sent
        assert httpx.get(f"{url}/open/one", timeout=30).json() == {"open": True}
        assert [line for line in lines if line] == ["data: [DONE]"]
    assert response.headers["content-type"].startswith("text/event-stream")


def test_more_requests_reach_the_application_than_it_admits(url: str) -> None:
    """Four streams are open at once where the settings admit two: refusing is the application's business."""
    names = [f"many-{number}" for number in range(4)]
    streams = []
    for name in names:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
        connection.request("GET", f"/stream/{name}")
        streams.append((connection, connection.getresponse()))
    assert [stream.readline() for _, stream in streams] == [b"data: first\n"] * 4
    for name in names:
        httpx.get(f"{url}/open/{name}", timeout=30)
    assert all(b"[DONE]" in stream.read() for _, stream in streams)
    for connection, _ in streams:
        connection.close()


def test_a_disconnect_reaches_the_application(url: str, tmp_path: Path) -> None:
    note = tmp_path / "left"
    with httpx.stream("GET", f"{url}/endless", params={"note": str(note)}, timeout=30) as response:
        assert next(response.iter_lines()) == "data: again"
    deadline = time.monotonic() + 30
    while not note.exists():
        assert time.monotonic() < deadline, "the stream went on without a reader"
        time.sleep(0.05)


def test_the_application_is_watched(url: str) -> None:
    looks: list[int] = []

    def stop() -> int:
        looks.append(1)
        return int(len(looks) > 25)

    serve_until(stop)
    assert len(looks) == 26


def test_a_port_in_use_is_refused() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        with (
            pytest.raises(ResourceError, match="the port is in use") as caught,
            serving(ServeConfig(port=port), f"{APPS}:build_app"),
        ):
            raise AssertionError("it serves")
    assert (caught.value.field, caught.value.value) == ("serve.port", f"127.0.0.1:{port}")


def test_an_address_of_another_machine_is_refused() -> None:
    with (
        pytest.raises(ResourceError, match="cannot listen there"),
        serving(ServeConfig(host="192.0.2.200"), f"{APPS}:build_app"),
    ):
        raise AssertionError("it serves")


def test_more_replicas_than_cpus_are_refused() -> None:
    with (
        pytest.raises(ResourceError, match="they need 500 CPU"),
        serving(ServeConfig(port=free_port(), replicas=500), f"{APPS}:build_app"),
    ):
        raise AssertionError("it serves")


class TestFailures:
    """Last in this file: each starts and stops Ray Serve, which the module's application shares."""

    def test_a_user_error_of_the_factory_comes_back_as_itself(self) -> None:
        config = ServeConfig(model="m", port=free_port())
        with pytest.raises(DataError, match="it must have weights"), serving(config, f"{APPS}:refuse", cpus=CPUS):
            raise AssertionError("it serves")
        with pytest.raises(urllib.error.URLError):
            urllib.request.urlopen(f"http://127.0.0.1:{config.port}/", timeout=5)

    def test_a_bug_of_the_factory_keeps_its_traceback(self) -> None:
        with (
            pytest.raises(ServingFailed, match=r"KeyError: 'no such layer'[\s\S]*in crash"),
            serving(ServeConfig(model="m", port=free_port()), f"{APPS}:crash", cpus=CPUS),
        ):
            raise AssertionError("it serves")

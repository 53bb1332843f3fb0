"""A job followed over a bad connection, and clients of a server that is silent: they end, and lose nothing."""

import http.server
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

from cluster import follow, job_client
from cluster.follow import Follow
from cluster.job_client import connect_jobs
from conf.errors import ResourceError

LOG = "job_manager\none\ntwo\nthree\n[sundog exit code 75]\n"


class Server:
    """A job server whose streams break off: each goes a few characters further than the one before."""

    def __init__(self, silent: bool = False) -> None:
        self.streams, self.silent = 0, silent

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.streams += 1
        for start in range(0, min(7 * self.streams, len(LOG)), 5):
            yield LOG[start : start + 5]
        if 7 * self.streams < len(LOG):
            raise ConnectionError("broken")

    def get_job_info(self, job: str) -> Any:
        if self.silent:
            raise ResourceError("cluster.address", "here", "the job server there does not answer")
        running = 7 * self.streams < len(LOG)
        status = JobStatus.RUNNING if running else JobStatus.STOPPED
        return SimpleNamespace(status=status, driver_exit_code=None, message="", error_type=None)

    def get_job_logs(self, job: str) -> str:
        return LOG

    def get_address(self) -> str:
        return "here"


def of(server: Server, lines: list[str]) -> Follow:
    client: Any = server
    return Follow(client, "a-job", lines.append, lambda: 0)


def test_a_log_whose_stream_breaks_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "STATUS_POLL_SEC", 0.01)
    lines: list[str] = []
    server = Server()
    assert of(server, lines).exit_code() == 75
    assert lines == ["job_manager", "one", "two", "three"]
    assert server.streams > 2


def test_a_server_that_is_gone_ends_the_following(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "STATUS_POLL_SEC", 0.01)
    monkeypatch.setattr(follow, "SILENCE_SEC", 0.05)
    with pytest.raises(ResourceError, match="does not answer") as caught:
        of(Server(silent=True), []).exit_code()
    assert "sundog logs -f a-job" in caught.value.fix


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a server that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def take() -> None:
            while True:
                try:
                    held.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        for connection in held:
            connection.close()


def test_a_mute_server_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch, mute: str) -> None:
    monkeypatch.setattr(job_client, "ANSWER_SEC", 0.2)
    with pytest.raises(ResourceError, match="is silent for"):
        connect_jobs(mute)


def test_a_wrong_token_is_refused_in_words() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Forbidding) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ResourceError, match="Invalid authentication token") as caught:
            connect_jobs(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert "RAY_AUTH_TOKEN" in caught.value.fix


class Forbidding(http.server.BaseHTTPRequestHandler):
    """Answers as a Ray head does to another token."""

    def do_GET(self) -> None:
        self.send_response(403)
        self.end_headers()
        self.wfile.write(b"Forbidden: Invalid authentication token")

    def log_message(self, format: str, *args: Any) -> None:
        pass

"""Any command as a Ray job: its code shipped, its log streamed, its real exit code returned."""

import asyncio
import json
import logging
import os
import queue
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from cluster.connection import check_address, split_address
from cluster.local_head import local_head
from cluster.upload import runtime_environment
from conf.errors import EXIT_BUG, EXIT_TERMINATED, ResourceError
from conf.schema import ClusterConfig

MODULE = "launch"
STOP_WAIT_SEC = 300  # a stopped job may finish its step and write its checkpoint; Ray's own default is 3
STATUS_POLL_SEC = 0.5
LOUD = ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk")  # uploads, closed sockets
CODE_LINE = re.compile(r"^\[sundog exit code (\d+)\]$", re.MULTILINE)


def submit(
    argv: list[str],
    cluster: ClusterConfig,
    *,
    working_dir: Path,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None],
    stop: Callable[[], int] = lambda: 0,
) -> int:
    """Run ``python -m launch *argv`` as a Ray job and return its exit code.

    The job goes to ``cluster.address`` (a job server, http://HOST:PORT, or a cluster address), and ``working_dir`` is
    uploaded for it: relative paths in it then mean folders of that copy, so outputs need absolute, shared ones.
    Without an address a local head is started for the job, which then runs in ``working_dir`` itself.
    ``env`` must hold no secrets: Ray shows it in its dashboard. ``stop() > 0``, or KeyboardInterrupt, stops the job,
    which then has 5 minutes to checkpoint.

    Raises:
        ResourceError: no job server there, the upload is too large, or the job never started.
    """
    with ExitStack() as stack:
        if cluster.address:
            shipped = _runtime_env(working_dir, env)
            address, line = cluster.address, _entrypoint(argv, "python")
        else:
            shipped = {"env_vars": _variables(env)}
            address = stack.enter_context(local_head(cluster, dashboard=True)).dashboard_url
            line = f"cd {shlex.quote(str(working_dir.absolute()))} && {{ {_entrypoint(argv, sys.executable)}; }}"
        client = _client(address)
        for name in LOUD:
            logging.getLogger(name).setLevel(logging.ERROR)
        job = client.submit_job(entrypoint=line, runtime_env=shipped)
        return _Follow(client, job, on_line, stop).exit_code()


def command_line(
    argv: list[str], cluster: ClusterConfig, *, working_dir: Path, env: Mapping[str, str] | None = None
) -> str:
    """Return the shell command that submits the same job by Ray's own tool.

    Without an address it goes to the cluster of this machine, if one runs (``ray start --head``). That tool exits only
    with 0 or 1; the log's last line has the exit code.
    """
    shipped = {
        key: value for key, value in _runtime_env(working_dir, env, measure=False).items() if key != "working_dir"
    }
    parts = ["ray", "job", "submit", *(["--address", cluster.address] if cluster.address else [])]
    parts += ["--working-dir", str(working_dir), "--runtime-env-json", json.dumps(shipped), "--"]
    return shlex.join([*parts, "python", "-m", MODULE, *_without_address(argv)])


def _runtime_env(working_dir: Path, env: Mapping[str, str] | None, measure: bool = True) -> dict[str, Any]:
    shipped = runtime_environment(working_dir.absolute(), measure)
    return {**shipped, "env_vars": _variables(env)}


def _variables(env: Mapping[str, str] | None) -> dict[str, str]:
    return {**(env or {}), "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_SEC)}


def _entrypoint(argv: list[str], python: str) -> str:
    """Return the job's shell line. It reports the exit code in the log, also of a job that was stopped.

    Ray sends SIGTERM to the shell too, which must outlive the command to report; a trap does that.
    """
    command = shlex.join([python, "-m", MODULE, *_without_address(argv)])
    return f'trap : TERM INT; {command}; code=$?; echo "[sundog exit code $code]"; exit $code'


def _without_address(argv: list[str]) -> list[str]:
    """Drop the cluster's address: a job finds its own cluster."""
    return [argument for argument in argv if not argument.startswith("cluster.address=")]


def _client(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        check_address(address)
    else:
        split_address(address)
    try:
        return JobSubmissionClient(address)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise ResourceError(
            "cluster.address",
            address,
            f"no Ray job server answers there: {reason[0][:300] if reason else error!r}",
            "http://HOST:8265 of a running head (`ray start --head`), or no address for a local one",
        ) from error


class _Follow:
    """A submitted job, followed to its end."""

    def __init__(
        self, client: JobSubmissionClient, job: str, on_line: Callable[[str], None], stop: Callable[[], int]
    ) -> None:
        self._client, self._job, self._on_line, self._stop = client, job, on_line, stop
        self._chunks: queue.Queue[str | None] = queue.Queue()
        self._partial, self._received = "", 0
        self._code: int | None = None
        threading.Thread(target=lambda: asyncio.run(self._tail()), daemon=True, name="job-log").start()

    async def _tail(self) -> None:
        try:
            async for chunk in self._client.tail_job_logs(self._job):
                self._chunks.put(chunk)
        except (RuntimeError, OSError) as error:
            logging.getLogger(__name__).debug("the log stream ended early: %s", error)
        finally:
            self._chunks.put(None)

    def exit_code(self) -> int:
        asked = False
        while True:
            try:
                if self._stop() and not asked:
                    asked = self._ask_to_stop()
                if not self._pass_on(STATUS_POLL_SEC) and (details := self._ended()) is not None:
                    return self._code_of(details)
            except KeyboardInterrupt:
                if asked:
                    raise
                asked = self._ask_to_stop()

    def _ask_to_stop(self) -> bool:
        self._on_line("stopping the job; it may finish its step and write a checkpoint")
        self._client.stop_job(self._job)
        return True

    def _pass_on(self, wait_sec: float) -> bool:
        """Hand over the log that has arrived; return whether more may come now."""
        try:
            chunk = self._chunks.get(timeout=wait_sec)
        except queue.Empty:
            return False
        if chunk is None:
            self._chunks.put(None)  # the end stays the end
            time.sleep(wait_sec)
            return False
        self._received += len(chunk)
        self._show(chunk)
        return True

    def _show(self, text: str) -> None:
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if found := CODE_LINE.match(line):
                self._code = int(found[1])
            else:
                self._on_line(line)

    def _ended(self) -> JobDetails | None:
        details = self._client.get_job_info(self._job)
        return details if details.status.is_terminal() else None

    def _code_of(self, details: JobDetails) -> int:
        """Return the exit code, from Ray's record or from the log's last line."""
        while self._pass_on(0.0):
            pass
        # The stream may end, or lag, before the log's end; the whole log has the rest.
        self._show(self._client.get_job_logs(self._job)[self._received :])
        if self._partial:
            self._show("\n")
        if details.driver_exit_code is not None:
            return details.driver_exit_code
        if self._code is not None:
            return self._code
        if details.status == JobStatus.STOPPED:
            return EXIT_TERMINATED
        self._on_line(f"the job {details.status.value.lower()}: {details.message}")
        return os.EX_OK if details.status == JobStatus.SUCCEEDED else EXIT_BUG

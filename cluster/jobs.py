"""Any command as a Ray job: its code shipped, its log streamed, its real exit code returned."""

import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes

from cluster.follow import Follow
from cluster.job_client import connect_jobs
from cluster.local_head import local_head
from cluster.upload import runtime_environment
from cluster.verdict import REPLACES
from conf.errors import EXIT_INTERRUPTED, EXIT_TERMINATED
from conf.schema import ClusterConfig

MODULE = "launch"
REVISION_VARIABLE = "SUNDOG_GIT_REVISION"  # what a run records as its code, where the job's copy has no .git
RESTARTS = 3  # of a command that a signal has killed, in a row, each within REST_SEC; and of a job that Ray has lost
REST_SEC = 60
LOST_PAUSE_SEC = 3.0  # Ray ends the command of a job that it has lost within a second
STOP_WAIT_SEC = 300  # a stopped job may finish its step and write its checkpoint; Ray's own default is 3


@dataclass(frozen=True)
class JobServer:
    """A Ray job server and what every job that is sent to it gets."""

    client: JobSubmissionClient
    runtime_env: dict[str, Any]
    folder: Path | None  # that jobs run in; None: in their copy of the uploaded one

    def run(self, argv: list[str], *, on_line: Callable[[str], None], stop: Callable[[], int] = lambda: 0) -> int:
        """Run ``python -m launch *argv`` as a job, follow it to its end and return its exit code.

        A command that a signal kills is started again by the job; a job that Ray has lost (its supervisor died, with
        its machine say) is submitted again. Commands go on where they were, so nothing is done twice.
        ``stop() > 0``, or KeyboardInterrupt, stops the job, which then has 5 minutes to checkpoint.
        """
        if self.folder is None:
            line = _entrypoint(argv, "python")
        else:
            line = f"cd {shlex.quote(str(self.folder))} && {{ {_entrypoint(argv, sys.executable)}; }}"
        facts = {"command": shlex.join(argv), "revision": self.runtime_env["env_vars"].get(REVISION_VARIABLE, "")}
        for left in reversed(range(RESTARTS + 1)):
            job = self.client.submit_job(entrypoint=line, runtime_env=self.runtime_env, metadata=facts)
            on_line(f"job {job}")
            follow = Follow(self.client, job, on_line, stop)
            code = follow.exit_code()
            if not (follow.lost and left) or stop():
                return code
            on_line("the job was lost, not its command's work: submitting it again")
            facts = {**facts, REPLACES: job}
            time.sleep(LOST_PAUSE_SEC)
        raise AssertionError("the last job returns")

    def total(self, resource: str) -> float:
        """The CPUs, GPUs or what else Ray counts, of all live nodes."""
        nodes: list[Any] = list_nodes(
            self.client.get_address(),
            filters=[("state", "=", "ALIVE")],
            limit=10_000,
            raise_on_missing_output=False,  # Ray takes the dead nodes that the filter leaves out for missing ones
        )
        return sum(node.resources_total.get(resource, 0.0) for node in nodes)


@contextmanager
def job_server(
    cluster: ClusterConfig, *, working_dir: Path, env: Mapping[str, str] | None = None
) -> Iterator[JobServer]:
    """A server for jobs with ``working_dir``'s code: that of ``cluster.address``, or of a local head for this block.

    To an address (a job server, http://HOST:PORT, or a cluster address) ``working_dir`` is uploaded: relative paths in
    a job then mean folders of that copy, so outputs need absolute, shared ones. On a local head jobs run in
    ``working_dir`` itself. ``env`` must hold no secrets: Ray shows it in its dashboard.

    Raises:
        ResourceError: no job server there, or the upload is too large.
    """
    if cluster.address:
        shipped = _runtime_env(working_dir, env)
        yield JobServer(connect_jobs(cluster.address), shipped, None)
        return
    with local_head(cluster, dashboard=True) as head:
        client = connect_jobs(head.dashboard_url)
        yield JobServer(client, {"env_vars": _variables(env)}, working_dir.absolute())


def submit(
    argv: list[str],
    cluster: ClusterConfig,
    *,
    working_dir: Path,
    env: Mapping[str, str] | None = None,
    on_line: Callable[[str], None],
    stop: Callable[[], int] = lambda: 0,
) -> int:
    """Run one command as a job of ``job_server``; see there and ``JobServer.run``."""
    with job_server(cluster, working_dir=working_dir, env=env) as server:
        return server.run(argv, on_line=on_line, stop=stop)


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

    Ray sends SIGTERM to the shell too, which must outlive the command to report; a trap does that. A command that died
    by a signal (exit code above 128), other than one that asks to end, is run again.
    """
    command = shlex.join([python, "-m", MODULE, *_without_address(argv)])
    return (
        f"stopped=; left={RESTARTS}; trap 'stopped=1' TERM INT; "
        f"while :; do began=$(date +%s); {command}; code=$?; "
        f'if [ $code -le 128 ] || [ $code = {EXIT_INTERRUPTED} ] || [ $code = {EXIT_TERMINATED} ] || [ "$stopped" ]; '
        f"then break; fi; "
        f"if [ $(($(date +%s) - began)) -gt {REST_SEC} ]; then left={RESTARTS}; fi; "
        f'if [ $left = 0 ]; then break; fi; left=$((left - 1)); echo "killed ($code): running it again"; '
        f'done; echo "[sundog exit code $code]"; exit $code'
    )


def _without_address(argv: list[str]) -> list[str]:
    """Drop the cluster's address: a job finds its own cluster."""
    return [argument for argument in argv if not argument.startswith("cluster.address=")]

"""``sundog list``, ``status``, ``logs`` and ``stop``: the jobs of a running Ray cluster."""

import argparse
import os
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from conf.errors import EXIT_DONE

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
TEXTS = {
    "list": "the submitted jobs of a cluster, newest first",
    "status": "what became of one job",
    "logs": "one job's log; of a running one until it ends, with -f",
    "stop": "ask a job to checkpoint and stop, and wait for it",
}


def main(name: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"sundog {name}", description=TEXTS[name])
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", DEFAULT_ADDRESS),
        help="of the job server; default: $RAY_API_SERVER_ADDRESS or %(default)s",
    )
    if name == "logs":
        parser.add_argument(
            "-f", "--follow", action="store_true", help="go on until the job ends; its exit code is ours"
        )
    if name != "list":
        parser.add_argument("job", help="a job's id, or the start or end of it")
    options = parser.parse_args(arguments)

    # Ray loads here, after the mistakes that can be answered without it.
    from cluster.follow import Follow
    from cluster.jobs import connect_jobs, find_job, list_jobs

    client = connect_jobs(options.address)
    if name == "list":
        _print_table([_row(job) for job in list_jobs(client)])
        return EXIT_DONE
    job = find_job(client, options.job)
    job_id = job.submission_id or ""
    if name == "status":
        for key, value in zip(("job", "state", "began", "ran", "command", "revision"), _row(job), strict=True):
            print(f"{key:<9} {value}")
        print(f"{'message':<9} {job.message or ''}")
    elif name == "logs" and not options.follow:
        print(client.get_job_logs(job_id), end="")
    elif name == "logs":
        return Follow(client, job_id, lambda line: print(line, flush=True), lambda: 0).exit_code()
    elif job.status.is_terminal():
        print(f"{job_id} has ended already: {job.status.value.lower()}")
    else:
        code = Follow(client, job_id, lambda line: print(line, flush=True), lambda: 1).exit_code()
        print(f"{job_id} stopped with exit code {code}")
    return EXIT_DONE


def _row(job: "JobDetails") -> tuple[str, ...]:
    facts = job.metadata or {}
    began = (job.start_time or 0) / 1000
    ran = (job.end_time / 1000 if job.end_time else time.time()) - began
    return (
        job.submission_id or "",
        job.status.value.lower(),
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)),
        f"{ran:.0f} s",
        facts.get("command", job.entrypoint),
        facts.get("revision", "")[:12],
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("job", "state", "began", "ran", "command", "revision"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table if rows else "no jobs", highlight=False)

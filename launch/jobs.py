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
COLUMNS = ("job", "state", "began", "ran", "command", "revision")
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
    from cluster.job_client import connect_jobs, find_job, list_jobs
    from cluster.verdict import SHELL, verdict

    client = connect_jobs(options.address)
    jobs = list_jobs(client)
    if name == "list":
        _print_table([_row(job) for job in jobs])
        return EXIT_DONE
    job = find_job(jobs, options.job)
    job_id = job.submission_id or ""
    if name == "status":
        _print_status(job, jobs)
    elif name == "logs" and not options.follow:
        lines = client.get_job_logs(job_id).splitlines()
        print("\n".join(line for line in lines if not SHELL.match(line)))
    elif name == "logs":
        return Follow(client, job_id, lambda line: print(line, flush=True), lambda: 0).exit_code()
    elif job.status.is_terminal():
        print(f"{job_id} has ended already: {verdict(job).state}")
    else:
        code = Follow(client, job_id, lambda line: print(line, flush=True), lambda: 1).exit_code()
        print(f"{job_id} stopped with exit code {code}")
    return EXIT_DONE


def _print_status(job: "JobDetails", jobs: "list[JobDetails]") -> None:
    from cluster.verdict import verdict

    found = verdict(job, jobs)
    rows = [*zip(COLUMNS, _row(job), strict=True), ("told", found.told), ("to do", found.todo)]
    for key, value in rows:
        for number, line in enumerate(value.splitlines()):
            print(f"{key if number == 0 else '':<9} {line}")


def _row(job: "JobDetails") -> tuple[str, ...]:
    from cluster.verdict import verdict

    facts = job.metadata or {}
    began = (job.start_time or 0) / 1000
    ran = (job.end_time / 1000 if job.end_time else time.time()) - began
    return (
        job.submission_id or "",
        verdict(job).state,
        time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began)),
        f"{ran:.0f} s",
        facts.get("command", job.entrypoint),
        facts.get("revision", "")[:12],
    )


def _print_table(rows: list[tuple[str, ...]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold", no_wrap=column != "command", min_width=8)
    for row in rows:
        table.add_row(*row)
    Console().print(table if rows else "no jobs", highlight=False)

"""What became of a job, in words: its state, what happened, and what to do about it."""

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from ray.job_submission import JobDetails, JobStatus

from conf.errors import EXIT_CONFIG, EXIT_INTERRUPTED, EXIT_RESOURCES, EXIT_STOPPED, EXIT_TERMINATED

LOST = "JOB_SUPERVISOR_ACTOR_DIED"  # Ray's word for a job whose own process, or machine, is gone
REPLACES = "replaces"  # key of a job's facts: the lost job in whose place it was submitted
CODE_LINE = re.compile(r"^\[sundog exit code (\d+)\]$", re.MULTILINE)
SHELL = re.compile(r"^(Running entrypoint for job |\S+ \S+\s+INFO job_manager\.py)")  # Ray's first lines of a log
AGAIN = "the same command goes on from its newest checkpoint"
LAST_LINES = 5


@dataclass(frozen=True)
class Verdict:
    """``state`` is one word; ``told`` are a few lines at most, ``todo`` is empty where there is nothing to do."""

    state: str
    told: str
    todo: str = ""


def verdict(job: JobDetails, jobs: Sequence[JobDetails] = ()) -> Verdict:
    """Judge a job; ``jobs`` are all that the server remembers, among which another may have taken its place."""
    name, message, code = job.submission_id or "", job.message or "", exit_code(job)
    log = f"`sundog logs {name}` has its whole log"
    if not job.status.is_terminal():
        told = "" if job.status == JobStatus.RUNNING else message
        return Verdict(job.status.value.lower(), told, f"`sundog logs -f {name}` follows it")
    if job.status == JobStatus.SUCCEEDED:
        return Verdict("done", "")
    if job.error_type == LOST:
        return _lost(job, jobs)
    if code is not None and code > 128 and code not in (EXIT_INTERRUPTED, EXIT_TERMINATED):
        why = "; most often because the machine had no memory left" if code == 128 + signal.SIGKILL else ""
        told = f"{_signal(code)} killed its command each time that it was run{why}"
        return Verdict("killed", told, f"{log}; give it more memory or less work; {AGAIN}")
    if job.status == JobStatus.STOPPED or code in (EXIT_STOPPED, EXIT_INTERRUPTED, EXIT_TERMINATED):
        return Verdict("stopped", "it was asked to stop" + ("" if code is None else f" (exit code {code})"), AGAIN)
    kinds = {EXIT_CONFIG: "a value, an input or the command is wrong", EXIT_RESOURCES: "something it needs is missing"}
    told = kinds.get(code or 0, "its command failed" if code is not None else "it did not start")
    head = told + ("" if code is None else f" (exit code {code})")
    return Verdict("failed", "\n".join([head, *_last_lines(message)]), f"{log}; {AGAIN}")


def exit_code(job: JobDetails) -> int | None:
    """Of its command, if it is known."""
    found = CODE_LINE.findall(job.message or "")
    return job.driver_exit_code if job.driver_exit_code is not None else int(found[-1]) if found else None


def _lost(job: JobDetails, jobs: Sequence[JobDetails]) -> Verdict:
    told = "Ray lost it: the process on the head node that looked after it died, and its command was ended with it"
    for other in jobs:
        if (other.metadata or {}).get(REPLACES) == job.submission_id:
            return Verdict("lost", told, f"nothing: it was submitted again as {other.submission_id}")
    return Verdict("lost", told, f"look at the memory of the head node; {AGAIN}")


def _signal(code: int) -> str:
    try:
        return signal.Signals(code - 128).name
    except ValueError:
        return f"signal {code - 128}"


def _last_lines(text: str) -> list[str]:
    """The end of a log or message, without what only Ray and the job's shell say."""
    lines = [line for line in text.splitlines() if line.strip() and not CODE_LINE.match(line) and not SHELL.match(line)]
    return [f"| {line}" for line in lines[-LAST_LINES:]]

"""What is said of a job that has ended, by what Ray records of it."""

from typing import Any

import pytest
from ray.job_submission import JobDetails

from cluster.verdict import LOST, REPLACES, verdict


def job(status: str, **facts: Any) -> JobDetails:
    given: dict[str, Any] = {"type": "SUBMISSION", "submission_id": "a", "entrypoint": "x", "status": status, **facts}
    return JobDetails(**given)


@pytest.mark.parametrize(
    ("facts", "state", "told", "todo"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, "done", "", ""),
        ({"status": "RUNNING"}, "running", "", "sundog logs -f a"),
        ({"status": "PENDING", "message": "waiting for a node"}, "pending", "waiting for a node", ""),
        ({"status": "FAILED", "driver_exit_code": 137}, "killed", "SIGKILL killed", "more memory"),
        ({"status": "FAILED", "driver_exit_code": 139}, "killed", "SIGSEGV killed", "sundog logs a"),
        ({"status": "FAILED", "driver_exit_code": 75}, "stopped", "asked to stop", "newest checkpoint"),
        ({"status": "STOPPED", "message": "[sundog exit code 75]"}, "stopped", "(exit code 75)", "newest checkpoint"),
        ({"status": "FAILED", "driver_exit_code": 143}, "stopped", "(exit code 143)", "newest checkpoint"),
        (
            {"status": "FAILED", "driver_exit_code": 2, "message": "a\nlr = x"},
            "failed",
            "is wrong (exit code 2)",
            "logs",
        ),
        ({"status": "FAILED", "driver_exit_code": 3}, "failed", "missing (exit code 3)", "logs"),
        ({"status": "FAILED", "message": "runtime_env: no room"}, "failed", "| runtime_env: no room", "sundog logs a"),
        ({"status": "FAILED", "error_type": LOST, "message": "actor_id"}, "lost", "Ray lost it", "newest checkpoint"),
    ],
)
def test_each_end_has_its_words(facts: dict[str, Any], state: str, told: str, todo: str) -> None:
    found = verdict(job(**facts))
    assert found.state == state
    assert told in found.told
    assert todo in found.todo


def test_the_end_of_the_log_is_told_without_what_the_shell_says() -> None:
    log = "Running entrypoint for job a: stopped=; left=3\nloading\n\nout of range\n[sundog exit code 1]\n"
    found = verdict(job("FAILED", driver_exit_code=1, message=log))
    assert found.told.splitlines() == ["its command failed (exit code 1)", "| loading", "| out of range"]


def test_a_lost_job_names_the_one_in_its_place() -> None:
    lost = job("FAILED", error_type=LOST)
    other = job("RUNNING", submission_id="b", metadata={REPLACES: "a"})
    assert verdict(lost, [other, lost]).todo == "nothing: it was submitted again as b"

"""Processes that a test has started, watched until they are gone."""

import os
import time
from pathlib import Path

import psutil


def descendants(pid: int) -> list[psutil.Process]:
    """Return all live processes below ``pid``."""
    return psutil.Process(pid).children(recursive=True)


def survivors(processes: list[psutil.Process], timeout: float) -> list[str]:
    """Wait until all of ``processes`` have ended, at most ``timeout`` seconds; return the command lines of the rest."""
    _, alive = psutil.wait_procs(processes, timeout)
    found = []
    for process in alive:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()) or process.name())
        except psutil.NoSuchProcess:
            continue
    return found


def wait_for_file(path: Path, timeout: float) -> str:
    """Return the text of ``path`` once it exists and is not empty."""
    deadline = time.monotonic() + timeout
    while not (path.exists() and path.stat().st_size):
        assert time.monotonic() < deadline, f"{path} did not appear in {timeout} s"
        time.sleep(0.05)
    return path.read_text()


def clean_environment(**changes: str) -> dict[str, str]:
    """Return an environment in which Ray's variables of this process do not show."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | changes

"""Unit functions for the tests of the pipeline."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from conf.errors import DataError


def square(unit: dict[str, Any]) -> dict[str, Any]:
    """Square a number; later units are faster, so that results arrive out of order."""
    time.sleep(unit.get("pause", 0.0))
    return {"number": unit["number"] ** 2, "pid": os.getpid(), "cwd": os.getcwd()}


def meet(unit: dict[str, Any]) -> dict[str, Any]:
    """End only once the other unit runs as well."""
    folder = Path(unit["folder"])
    (folder / str(unit["number"])).touch()
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < 2:
        assert time.monotonic() < deadline, "the other unit never ran beside this one"
        time.sleep(0.01)
    return {"pid": os.getpid()}


def die_once(unit: dict[str, Any]) -> dict[str, Any]:
    """Kill the worker's process on the first visit."""
    marker = Path(unit["marker"])
    if unit["dies"] and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return {"number": unit["number"]}


def die_always(unit: dict[str, Any]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def refuse(unit: dict[str, Any]) -> dict[str, Any]:
    raise DataError(unit["name"], 12, "it must be text", "another file")


def divide(unit: dict[str, Any]) -> dict[str, Any]:
    return {"number": 1 / unit["number"]}

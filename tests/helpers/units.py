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

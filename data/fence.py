"""Who may write into a stage folder: one driver at a time, and its units of work for as long as it lives.

A driver holds a lock on the folder for as long as it lives; the kernel lets go when it dies. It also writes a token of
its own into the folder. A unit carries the token and looks, each time that it is about to make a file appear, whether
the folder is still its driver's. So a worker that outlives its driver (a lost connection, a stopped process that goes
on) makes nothing appear any more, neither in an abandoned folder nor beside the work of the next driver.

The look and the rename share a lock that a new driver takes exclusively before it begins: nothing comes between them.
Only processes of one host see the driver's lock; on other hosts the token alone decides, until the next driver writes
its own.
"""

import fcntl
import json
import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from conf.errors import DataError
from data.files import APPEARING, LOCK, exclusive, make_folder, writing

OWNER = ".owner"
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def this_host() -> str:
    """A name for the running system that no other one has."""
    return BOOT_ID.read_text().strip() if BOOT_ID.is_file() else os.uname().nodename


@contextmanager
def owned(folder: str | Path, rule: str, fix: str) -> Iterator[str]:
    """Makes the folder and holds it against other drivers; yields the token that units carry as ``owner``.

    Raises as ``data.files.exclusive`` does.
    """
    folder = make_folder(folder)
    with ExitStack() as stack:
        with writing(folder):
            owner = stack.enter_context(open(folder / OWNER, "a"))
        fcntl.flock(owner, fcntl.LOCK_EX)  # a unit of an earlier driver ends its rename first
        stack.enter_context(exclusive(folder, rule, fix))
        token = json.dumps([uuid.uuid4().hex, this_host()])
        with writing(folder):
            owner.truncate(0)
            owner.write(token)
            owner.flush()
        fcntl.flock(owner, fcntl.LOCK_UN)
        yield token


@contextmanager
def working(unit: dict[str, Any]) -> Iterator[None]:
    """What appears inside is the work of ``unit``; one without an ``owner`` answers to nobody."""
    if not unit.get("owner"):
        yield
        return
    mark = APPEARING.set(partial(_checked, Path(unit["folder"]), unit["owner"]))
    try:
        yield
    finally:
        APPEARING.reset(mark)


@contextmanager
def _checked(folder: Path, token: str) -> Iterator[None]:
    """Raises DataError where the folder belongs to nobody or to another driver."""
    rule, fix = "work for a command that has ended is given up", "run the command again"
    try:
        owner = open(folder / OWNER)  # noqa: SIM115 - closed below
    except FileNotFoundError as error:
        raise DataError(str(folder), "gone", rule, fix) from error
    with owner:
        fcntl.flock(owner, fcntl.LOCK_SH)
        if owner.read() != token or not _lives(folder, token):
            raise DataError(str(folder), "not this command's any more", rule, fix)
        yield


def _lives(folder: Path, token: str) -> bool:
    """Whether the driver of ``token`` holds its lock, as far as this host can know."""
    if json.loads(token)[1] != this_host():
        return True
    with open(folder / LOCK) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False

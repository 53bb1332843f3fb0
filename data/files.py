"""Files that are either complete or absent: write beside, fsync, rename; and digests of files and settings."""

import errno
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from conf.errors import DataError, ResourceError, SundogError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # the disk, the user's quota, the process' limit
LOCK = ".lock"
TEMPORARY = ".*.tmp"  # glob of what a killed writer leaves behind
# Held while a file appears; data/fence.py puts a check there
APPEARING: ContextVar[Callable[[], AbstractContextManager[None]]] = ContextVar("APPEARING", default=nullcontext)


def write_error(path: str | Path, error: OSError) -> SundogError:
    """The user's error for an OSError met while writing ``path``: ResourceError for a full disk, else DataError."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        return ResourceError(
            str(path), reason, "the disk has room for the output", "free some space or choose another folder"
        )
    return DataError(str(path), reason, "the output can be written", "choose a folder that this user may write to")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turns an OSError raised inside into the user's error that names ``path``."""
    try:
        yield
    except OSError as error:
        raise write_error(path, error) from error


def make_folder(path: str | Path) -> Path:
    """Creates a folder with its parents. Raises DataError or ResourceError where that is impossible."""
    path = Path(path)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
    return path


def fsync_folder(path: str | Path) -> None:
    """Makes renames inside a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a sibling path to write to; on success it is fsynced and renamed to ``path``, else removed.

    Readers never see a part of the file, whenever the writer is killed. Raises ResourceError when the disk is full and
    DataError when the folder cannot be written; both name ``path``.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        with writing(path):
            yield temporary
            descriptor = os.open(temporary, os.O_RDWR)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            with APPEARING.get()():
                os.replace(temporary, path)
            fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a small file completely or not at all; text as UTF-8. Raises as ``atomic_path`` does."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_temporaries(folder: str | Path) -> None:
    """Removes what killed writers left below ``folder``; the caller must be the only one at work there."""
    for path in Path(folder).rglob(TEMPORARY):
        path.unlink(missing_ok=True)


@contextmanager
def exclusive(folder: str | Path, rule: str, fix: str) -> Iterator[None]:
    """Makes the folder and holds it against other processes of this host; the kernel lets go when the holder dies.

    Raises ResourceError with ``rule`` and ``fix`` when another one holds it, else as ``make_folder`` does.
    """
    folder = make_folder(folder)
    with writing(folder):
        file = open(folder / LOCK, "w")  # noqa: SIM115 - closed below; errors inside the body are not about this file
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ResourceError(str(folder), "in use", rule, fix) from error
        yield


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises DataError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(str(path), error.strerror or "", "the file can be read") from error


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_json(value: Any) -> str:
    """SHA-256 of a JSON-like value's canonical form, in hexadecimal."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def read_json(path: str | Path) -> Any:
    """Parses a JSON file. Raises DataError when it is missing or broken."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DataError(str(path), error.strerror or "", "the file can be read") from error
    except ValueError as error:
        raise DataError(str(path), str(error), "the file holds JSON", "remove the folder and make it again") from error

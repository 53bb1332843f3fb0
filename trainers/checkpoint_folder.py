"""The checkpoint folder as files: names, completeness, damage, retention. No torch, no process group.

``checkpoints/step-000000050/`` is written as ``step-000000050.tmp``, renamed, and is a checkpoint once it holds
``COMPLETE``: a JSON object with the size and the SHA-256 of every other file. Whatever lacks the marker never was a
checkpoint. Deleting goes the other way round (marker first), so that a half-deleted folder is none either.
"""

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from conf.errors import DataError
from data.files import file_digest, fsync_folder, write_atomic

CHECKPOINTS = "checkpoints"  # folder below run_dir
MARKER = "COMPLETE"
STATE = "state.json"
TEMPORARY, DAMAGED = ".tmp", ".corrupt"
_NAME = re.compile(r"step-(\d{9,})")


def checkpoints_folder(run_dir: str) -> Path:
    """Return where the checkpoints of a run live."""
    return Path(run_dir).absolute() / CHECKPOINTS


def step_folder(folder: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` optimizer steps lives."""
    return folder / f"step-{step:09d}"


def step_of(path: Path) -> int:
    """Return the optimizer steps done in the checkpoint at ``path``."""
    match = _NAME.fullmatch(path.name)
    assert match, f"{path} is not named like a checkpoint"
    return int(match[1])


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints that carry the marker, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / MARKER).is_file()]
    return sorted(found, key=step_of, reverse=True)


def newest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint that carries the marker, or None; :func:`damage` looks at its files."""
    return next(iter(complete_checkpoints(folder)), None)


def digests(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return ``{name: {"bytes": size, "sha256": hex}}``."""
    return {file.name: {"bytes": file.stat().st_size, "sha256": file_digest(file)} for file in files}


def mark_complete(path: Path, files: dict[str, dict[str, Any]]) -> None:
    """Declare the checkpoint at ``path`` complete: the last thing that is written."""
    write_atomic(path / MARKER, json.dumps({"files": files}, indent=1, sort_keys=True) + "\n")
    fsync_folder(path)


def damage(path: Path, part: int = 0, parts: int = 1) -> str:
    """Return what is wrong with the files of a checkpoint, or an empty string.

    Compares every file with the size in the marker, and each ``parts``-th one, from ``part`` on, with its digest: the
    ranks share that work.
    """
    try:
        listed = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
        expected = [(str(name), int(entry["bytes"]), str(entry["sha256"])) for name, entry in sorted(listed.items())]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MARKER} cannot be read: {error}"
    if STATE not in listed:
        return f"{MARKER} does not list {STATE}"
    for index, (name, size, digest) in enumerate(expected):
        file = path / name
        try:
            actual = file.stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes, {size} were written"
            if index % parts == part and file_digest(file) != digest:
                return f"{name} differs from what was written (SHA-256)"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return ""


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint.

    Raises:
        DataError: it is missing or is not a JSON object.
    """
    file = path / STATE
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(str(file), "", f"state of a checkpoint: {error}", "use another checkpoint") from error
    if not isinstance(state, dict):
        raise DataError(str(file), type(state).__name__, "a JSON object is expected", "use another checkpoint")
    return state


def remove(path: Path) -> None:
    """Delete a checkpoint so that at no moment a part of it looks complete."""
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path)


def retain(folder: Path, keep: int) -> list[Path]:
    """Delete all but the newest ``keep`` complete checkpoints, and unfinished ones older than the newest.

    Returns the folders that were deleted. Call it only when the newest one is durable.
    """
    complete = complete_checkpoints(folder)
    if not complete:
        return []
    newest = step_of(complete[0])
    unfinished = [
        path
        for path in folder.iterdir()
        if path.is_dir() and (match := _NAME.fullmatch(path.name.removesuffix(TEMPORARY)))
        if path not in complete and int(match[1]) < newest
    ]
    gone = complete[max(keep, 1) :] + unfinished
    for path in gone:
        remove(path)
    return gone


def quarantine(path: Path) -> Path:
    """Move a damaged checkpoint aside, where neither resume nor retention sees it, and return its new name."""
    aside = path.with_name(path.name + DAMAGED)
    if aside.exists():
        shutil.rmtree(aside)
    path.rename(aside)
    fsync_folder(aside.parent)
    return aside

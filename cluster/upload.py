"""The working folder that Ray copies to other machines: what goes, how much it is, and a bound."""

import os
import subprocess
from pathlib import Path
from typing import Any

from conf.errors import ResourceError

MAX_UPLOAD_BYTES = 100 * 2**20
SHOWN_PATHS = 5

EXCLUDES = (
    ".git",
    ".venv",
    "venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    ".mypy_cache",
    ".hypothesis",
    ".import_linter_cache",
    "node_modules",
    "build",
    "dist",
    "runs",
    "outputs",
    "multirun",
    "wandb",
)


def runtime_environment(folder: Path, measure: bool = True) -> dict[str, Any]:
    """Return the part of a Ray runtime environment that ships ``folder``; ``measure`` checks its size first.

    Raises:
        ResourceError: it holds more than 100 MiB; the message names the biggest paths.
    """
    if measure:
        check_size(folder)
    return {"working_dir": str(folder), "excludes": list(EXCLUDES)}


def upload_files(folder: Path) -> dict[str, int]:
    """Return relative path -> bytes of what Ray uploads: without ``EXCLUDES`` and what git ignores."""
    ignored = _ignored_by_git(folder)
    sizes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder):
        relative = os.path.relpath(parent, folder)
        prefix = "" if relative == "." else relative + "/"
        folders[:] = [name for name in folders if name not in EXCLUDES and f"{prefix}{name}/" not in ignored]
        for name in names:
            path = f"{prefix}{name}"
            if name not in EXCLUDES and path not in ignored:
                sizes[path] = os.lstat(os.path.join(parent, name)).st_size
    return sizes


def _ignored_by_git(folder: Path) -> set[str]:
    """Return the paths under ``folder`` that its .gitignore files exclude (Ray honours them); folders end with /."""
    command = ["git", "-C", str(folder), "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"]
    try:
        listing = subprocess.run(command, capture_output=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return set()  # no git or no repository: nothing is ignored beyond EXCLUDES
    return {os.fsdecode(path) for path in listing.split(b"\0") if path}


def check_size(folder: Path, limit: int = MAX_UPLOAD_BYTES) -> int:
    """Return the bytes that would be uploaded.

    Raises:
        ResourceError: more than ``limit``.
    """
    sizes = upload_files(folder)
    total = sum(sizes.values())
    if total > limit:
        biggest = sorted(sizes.items(), key=lambda item: -item[1])[:SHOWN_PATHS]
        listing = ", ".join(f"{path} ({size / 2**20:.1f} MiB)" for path, size in biggest)
        raise ResourceError(
            "working folder",
            folder,
            f"{total / 2**20:.1f} MiB to upload, the limit is {limit / 2**20:.0f} MiB; biggest: {listing}",
            "move these out of the folder, or name them in .gitignore",
        )
    return total

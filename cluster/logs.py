"""The log file of a rank: everything that its process writes, from Python or from native code."""

import faulthandler
import io
import os
import sys
from pathlib import Path

TAIL_LINES = 30
TAIL_BYTES = 64 * 1024


def log_path(folder: Path, rank: int) -> Path:
    """Return where rank ``rank`` logs."""
    return folder / f"rank-{rank:03d}.log"


def redirect(path: Path, first_line: str) -> None:
    """Send file descriptors 1 and 2 of this process to the end of ``path``, and crash traces too.

    Descriptors are replaced, not just ``sys.stdout``: gloo, NCCL and the C++ runtime write to them directly.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.write(target, f"--- {first_line}\n".encode())
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), line_buffering=True, write_through=True)
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), line_buffering=True, write_through=True)
    faulthandler.enable(file=2, all_threads=True)


def tail(path: Path | None, lines: int = TAIL_LINES) -> str:
    """Return the last lines of a log; an empty string when it is not on this machine."""
    try:
        if path is None:
            return ""
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - TAIL_BYTES, 0))
            return "\n".join(file.read().decode(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""

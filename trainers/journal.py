"""Records by step as JSON lines: one line an optimizer step, whatever was killed in between. No torch."""

import errno
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.files import atomic_path

METRICS_FILE = "metrics.jsonl"
SAMPLES_FILE = "samples.jsonl"


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Return the records of a journal in file order; a missing file has none.

    A line that is not a JSON object with a ``step`` is left out: the last line of a run that is still going, or was
    killed while it wrote, may be half there.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


class Journal:
    """Append-only writer of a run's records; one process has it open. ``sync`` may run in another thread.

    Opening it for a run that continues after ``resume_step`` drops the lines of later steps (they are about to be
    made again) and a torn last line, in a new file that then takes the old one's place.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = {record["step"]: record for record in read_journal(path) if record["step"] <= resume_step}
            with atomic_path(path) as beside:
                beside.write_text("".join(_line(kept[step]) for step in sorted(kept)), encoding="utf-8")
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()
        self._unwritten = b""  # lines, or the rest of one, for which the disk had no room

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the record of ``step`` (optimizer steps done) and hand it to the operating system.

        Numbers that JSON lacks (a loss that is not finite) become null. On a full disk the line waits in memory.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        line = _line({"step": step, "time": round(time.time(), 3), **finite}).encode()
        with self._lock, _full_disk_may_pass():
            self._unwritten += line
            self._drain()

    def _drain(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[os.write(self._file, self._unwritten) :]

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint is declared complete.

        Raises:
            OSError: the disk has no room for it.
        """
        with self._lock:
            self._drain()
        os.fsync(self._file)

    def close(self) -> None:
        with _full_disk_may_pass():
            self._drain()
        os.close(self._file)


@contextmanager
def _full_disk_may_pass() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"

"""Records by step as JSON lines: one line an optimizer step, whatever was killed in between. No torch."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

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
    """Append-only writer of a run's records; one process has it open.

    Opening it for a run that continues after ``resume_step`` drops the lines of later steps (they are about to be
    made again) and a torn last line, in a new file that then takes the old one's place.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            kept = {record["step"]: record for record in read_journal(path) if record["step"] <= resume_step}
            with atomic_path(path) as beside:
                beside.write_text("".join(_line(kept[step]) for step in sorted(kept)), encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append the record of ``step`` (optimizer steps done) and hand it to the operating system.

        Numbers that JSON lacks (a loss that is not finite) become null.
        """
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        self._file.write(_line({"step": step, "time": round(time.time(), 3), **finite}))
        self._file.flush()

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint is declared complete."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"

"""Progress of long work: a live bar on a terminal, plain lines with an ETA when piped."""

import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_SEC = 5.0


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 4.2s, 3m05s, 2h10m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


class Show(Protocol):
    """Shows how far something is; ``note`` says more."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


def progress(label: str) -> Show:
    """Return a callback ``(done, total, note)`` that shows how far ``label`` is, on standard error."""
    return _bar(label) if sys.stderr.isatty() else _lines(label)


def _bar(label: str) -> Show:
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    note_column = TextColumn("{task.fields[note]}")
    bar = Progress(*columns, TimeRemainingColumn(), note_column, console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None, note="")
    bar.start()

    def show(done: int, total: int, note: str = "") -> None:
        bar.update(task, completed=done, total=total, note=note)
        if done >= total:
            bar.stop()

    return show


def _lines(label: str) -> Show:
    start = last = time.monotonic()
    before: int | None = None  # done when it began: a run that goes on has a part behind it

    def show(done: int, total: int, note: str = "") -> None:
        nonlocal last, before
        now = time.monotonic()
        before = done if before is None else before
        if done > before and (now - last >= LINE_INTERVAL_SEC):
            last = now
            eta = (now - start) / (done - before) * (total - done)
            more = f", {note}" if note else ""
            print(f"  {label}: {done}/{total}, eta {format_seconds(eta)}{more}", file=sys.stderr, flush=True)

    return show

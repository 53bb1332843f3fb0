"""Progress of long work: a live bar on a terminal, plain lines with an ETA when piped."""

import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_INTERVAL_SEC = 5.0


def format_seconds(seconds: float) -> str:
    """Return a duration as people say it: 4.2s, 3m05s, 2h10m."""
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def progress(label: str) -> Callable[[int, int], None]:
    """Return a callback ``(done, total)`` that shows how far ``label`` is, on standard error."""
    return _bar(label) if sys.stderr.isatty() else _lines(label)


def _bar(label: str) -> Callable[[int, int], None]:
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=None)
    bar.start()

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    return show


def _lines(label: str) -> Callable[[int, int], None]:
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done and (now - last >= LINE_INTERVAL_SEC):
            last = now
            eta = (now - start) / done * (total - done)
            print(f"  {label}: {done}/{total}, eta {format_seconds(eta)}", file=sys.stderr, flush=True)

    return show

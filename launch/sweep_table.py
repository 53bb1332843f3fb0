"""The live table of a sweep: redrawn in place on a terminal, a line for each change of state when piped."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch.progress import format_seconds

if TYPE_CHECKING:
    from launch.sweep import Job

PIPED_WIDTH = 1000


def render(jobs: "Sequence[Job]", metric: str, lowest_first: bool) -> Table:
    """The jobs as a table, the best value of the metric first, those without one last."""
    sign = 1 if lowest_first else -1
    found = Table(box=None, pad_edge=False)
    for column in ("job", "state", "step", metric, "time", ""):
        found.add_column(column, overflow="fold", justify="right" if column in ("step", "time") else "left")
    for job in sorted(jobs, key=lambda job: (job.value is None, sign * (job.value or 0.0))):
        value = "" if job.value is None else f"{job.value:.4f}"
        time = format_seconds(job.seconds) if job.seconds else ""
        found.add_row(job.label, job.state, f"{job.step}/{job.steps}", value, time, job.message)
    return found


@contextmanager
def table(metric: str, lowest_first: bool) -> "Iterator[Callable[[Sequence[Job]], None]]":
    """A function that shows the jobs; the last table stays on the screen, and ends a piped output too."""
    console = Console()
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            yield lambda jobs: live.update(render(jobs, metric, lowest_first))
        return
    states: dict[str, str] = {}
    latest: list[Sequence[Job]] = []

    def show(jobs: "Sequence[Job]") -> None:
        latest[:] = [jobs]
        for job in jobs:
            if states.get(job.label) != job.state:
                states[job.label] = job.state
                if job.state != "waiting":
                    print(f"{job.state:<8} {job.label}  {job.message}".rstrip(), flush=True)

    try:
        yield show
    finally:
        if latest:
            wide = Console(width=PIPED_WIDTH)  # as wide as its lines: a log is searched, not looked at
            wide.print(render(latest[0], metric, lowest_first), highlight=False)

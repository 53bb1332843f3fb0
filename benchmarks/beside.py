"""Our training step in turn with another loop's steps, in one process, so that both see the same machine."""

import time
from collections.abc import Callable

from benchmarks.table import Times


class Beside:
    """Times the steps of a loop that tells it of each, and does one of ours after each."""

    def __init__(self, ours: Callable[[], float]) -> None:
        self._ours, self._started = ours, (0.0, 0.0)
        self.ours, self.peer = Times([], []), Times([], [])
        self.losses: list[float] = []

    def begin(self) -> None:
        """The loop's first step begins now."""
        self._started = _now()

    def turn(self) -> None:
        """The loop has done a step."""
        self._add(self.peer)
        self.losses.append(self._ours())
        self._add(self.ours)

    def _add(self, times: Times) -> None:
        (wall, cpu), started = _now(), self._started
        times.wall.append(wall - started[0])
        times.cpu.append(cpu - started[1])
        self._started = _now()


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()

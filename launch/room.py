"""What a cluster has for the jobs of a sweep: each gets its own CPUs and GPUs, the first that fits first."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from conf.errors import ResourceError
from conf.schema import ClusterConfig

LOOK_SEC = 0.5  # between two looks at the stop request
ROUNDING = 1e-6  # fractions of a CPU add up to almost one


@dataclass(frozen=True)
class Need:
    """What one job takes while it runs."""

    cpus: float
    gpus: float


class Room:
    """CPUs and GPUs, lent to at most ``most`` jobs at a time (0: to as many as there is room for)."""

    def __init__(self, cpus: float, gpus: float, most: int = 0) -> None:
        self.cpus, self.gpus, self.most = cpus, gpus, most
        self._lent: list[Need] = []
        self._queue: list[tuple[object, Need]] = []
        self._changed = threading.Condition()

    def need(self, cluster: ClusterConfig) -> Need:
        """What a job's gang asks for; an elastic one that does not fit whole, its smallest.

        Raises:
            ResourceError: it would not fit if nothing else ran.
        """
        for ranks in (cluster.ranks, cluster.min_ranks or cluster.ranks):
            need = Need(ranks * cluster.cpus_per_rank, ranks * cluster.gpus_per_rank)
            if need.cpus <= self.cpus + ROUNDING and need.gpus <= self.gpus + ROUNDING:
                return need
        kind, asked, there = "CPUs", cluster.ranks * cluster.cpus_per_rank, self.cpus
        if asked <= there + ROUNDING:
            kind, asked, there = "GPUs", cluster.ranks * cluster.gpus_per_rank, self.gpus
        supply = f"its ranks need {asked:g} {kind}, the cluster has {there:g}"
        raise ResourceError("cluster.ranks", cluster.ranks, supply, "fewer ranks, or a larger cluster")

    @contextmanager
    def lend(self, need: Need, stop: Callable[[], bool]) -> Iterator[bool]:
        """Wait until this is the first of those that wait which fits; False: ``stop()`` came first, nothing is lent."""
        ticket = (object(), need)
        with self._changed:
            self._queue.append(ticket)
            while self._next() is not ticket and not stop():
                self._changed.wait(LOOK_SEC)
            lent = not stop()
            self._queue.remove(ticket)
            if lent:
                self._lent.append(need)
            self._changed.notify_all()
        try:
            yield lent
        finally:
            with self._changed:
                if lent:
                    self._lent.remove(need)
                self._changed.notify_all()

    def _next(self) -> tuple[object, Need] | None:
        return next((waiting for waiting in self._queue if self._fits(waiting[1])), None)

    def _fits(self, need: Need) -> bool:
        cpus = need.cpus + sum(other.cpus for other in self._lent)
        gpus = need.gpus + sum(other.gpus for other in self._lent)
        enough = cpus <= self.cpus + ROUNDING and gpus <= self.gpus + ROUNDING
        return enough and (self.most == 0 or len(self._lent) < self.most)

"""A gang: N ranks that start, run one function, and end together."""

import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import RayError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.failures import GangStopped, RankFailed
from cluster.placement import Sizes, place
from cluster.processes import await_death, on_hosts
from cluster.rendezvous import Seat, environments, seat_ranks
from cluster.watch import STOP_TIMEOUT_SEC, WAIT_SEC, OnEvent, Watch
from cluster.worker import Rank
from conf.errors import ResourceError
from conf.schema import ClusterConfig

CONTROL_THREADS = 4  # run, poll, cancel and idle at once


class Gang:
    """N ranks on one placement group of the connected cluster; a context manager that leaves none behind.

    It has ``cluster.ranks`` ranks, or as many of ``sizes`` as the cluster has room for; ``patient`` waits for machines
    that are not there. ``stop()`` returns how often a stop was requested: 1 asks the ranks to checkpoint and end, 2
    kills them. A gang runs once. After a failure its processes are gone; start another.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        *,
        name: str = "run",
        log_dir: Path | None = None,
        sizes: Sizes | None = None,
        patient: bool = False,
        stop: Callable[[], int] = lambda: 0,
        stop_timeout_sec: float = STOP_TIMEOUT_SEC,
    ) -> None:
        self.seats: list[Seat] = []  # in rank order, once started
        self._cluster, self._name = cluster, f"sundog-{name}-{secrets.token_hex(3)}"
        self._log_dir = log_dir.absolute() if log_dir else None
        self._sizes, self._patient = sizes or Sizes((cluster.ranks,)), patient
        self._stop, self._stop_timeout = stop, stop_timeout_sec
        self._cancelled = threading.Event()
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []  # in rank order, once started

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """Ask all ranks to stop; safe in a signal handler and in any thread."""
        self._cancelled.set()

    def _stops(self) -> int:
        return max(int(self._stop()), int(self._cancelled.is_set()))

    def _start(self) -> None:
        self._group, ranks = place(
            self._cluster, self._sizes, self._name, patient=self._patient, stopping=lambda: self._stops() > 0
        )
        cluster = self._cluster = replace(self._cluster, ranks=ranks)
        deadline = time.monotonic() + cluster.start_timeout_sec
        for index in range(cluster.ranks):
            # One rank alone is never restarted: its peers would wait for one that no longer knows them.
            options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": CONTROL_THREADS}
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            actor = ray.remote(Rank).options(
                num_cpus=cluster.cpus_per_rank,
                num_gpus=cluster.gpus_per_rank,
                scheduling_strategy=strategy,
                name=f"{self._name}-{index}",
                **options,
            )
            self._actors.append(actor.remote())
        by_bundle: list[Seat] = self._all(
            [actor.seat.remote(index) for index, actor in enumerate(self._actors)], deadline
        )
        self.seats = seat_ranks(by_bundle)
        self._actors = [self._actors[seat.index] for seat in self.seats]
        port = self._all([self._actors[0].hold_port.remote()], deadline)[0]
        threads = cluster.threads_per_rank or max(int(cluster.cpus_per_rank), 1)
        log_dir = str(self._log_dir or "")
        prepared = [
            actor.prepare.remote(environment, os.getcwd(), log_dir)
            for actor, environment in zip(self._actors, environments(self.seats, port, threads), strict=True)
        ]
        self._all(prepared, deadline)

    def _all(self, refs: list[Any], deadline: float) -> list[Any]:
        """Return what all calls return; look at the stop request while waiting."""
        waiting = refs
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=WAIT_SEC)
            for ref in ready:
                try:
                    ray.get(ref)
                except RayError as error:
                    place_in = refs.index(ref)
                    node = self.seats[place_in].host if self.seats else "its node"
                    reason = str(error).strip().splitlines()[-1]
                    raise RankFailed(place_in, node, f"did not start: {reason}", "", "", died=True) from error
            if waiting and self._stops():
                raise GangStopped
            if waiting and time.monotonic() > deadline:
                raise ResourceError(
                    "cluster.start_timeout_sec",
                    self._cluster.start_timeout_sec,
                    f"{len(waiting)} of {len(refs)} ranks did not start in time",
                    "a larger cluster.start_timeout_sec, or look at `ray list actors`",
                )
        return ray.get(refs)

    def run(self, function: str, config: Any, on_event: OnEvent | None = None) -> list[Any]:
        """Call ``function(config, control)`` on every rank; return the results in rank order.

        Events that rank 0 emits go to ``on_event``, in order, in this thread.

        Raises:
            SundogError: what a rank raised, as it was raised.
            RankFailed: the first rank that failed otherwise, or that hangs: it has not used its control for
                ``cluster.hang_timeout_sec``. The stacks of all ranks that still ran are in their logs.
            StopForced: a stop was asked for twice, or the ranks did not end in time after the first.
        """
        watch = Watch(
            self._actors,
            self.seats,
            log_dir=self._log_dir,
            stops=self._stops,
            stop_timeout_sec=self._stop_timeout,
            hang_timeout_sec=self._cluster.hang_timeout_sec,
            on_event=on_event or (lambda event: None),
        )
        return watch.results(function, config)

    def close(self) -> None:
        """Kill what still runs, wait until it is gone, and free the reservation."""
        for actor in self._actors:
            with suppress(RayError, ValueError):
                ray.kill(actor, no_restart=True)
        if self._group is not None:
            with suppress(RayError, ValueError):
                remove_placement_group(self._group)
            self._group = None
        on_hosts(self.seats, await_death)
        self._actors = []

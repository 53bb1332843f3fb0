"""The other ranks of a replica whose model runs over several processes."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import ray
from ray.util import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import rendezvous
from cluster.gang import CONTROL_THREADS
from cluster.worker import Rank


class Crew:
    """Ranks 1 and on of the placement group that this process, rank 0, was started in; they end when it does."""

    def __init__(self, ranks: int, cpus: float, gpus: float, environment: Mapping[str, str]) -> None:
        group = get_current_placement_group()
        assert group is not None, "a replica of several ranks has a placement group"
        self._actors: list[Any] = []
        for bundle in range(1, ranks):
            strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle)
            options = {"max_restarts": 0, "max_concurrency": CONTROL_THREADS, "scheduling_strategy": strategy}
            self._actors.append(ray.remote(Rank).options(num_cpus=cpus, num_gpus=gpus, **options).remote())
        self._own = Rank()
        others = [actor.seat.remote(index) for index, actor in enumerate(self._actors, 1)]
        seats = [self._own.seat(0), *ray.get(others)]
        environments = rendezvous.environments(seats, self._own.hold_port(), max(int(cpus), 1))
        rendezvous.apply(environments[0])
        own = zip(self._actors, environments[1:], strict=True)
        ray.get([actor.prepare.remote({**environment, **theirs}, os.getcwd(), "") for actor, theirs in own])
        self._running: list[Any] = []

    def run(self, function: str, config: Any) -> None:
        """Start ``function(config, control)`` on the other ranks."""
        self._running = [actor.run.remote(function, config) for actor in self._actors]

    @property
    def complete(self) -> bool:
        """Whether every rank still runs."""
        ended, _ = ray.wait(self._running, num_returns=len(self._running), timeout=0)
        return not ended

    def close(self) -> None:
        """Kill the other ranks."""
        for actor in self._actors:
            with suppress(ValueError):
                ray.kill(actor)

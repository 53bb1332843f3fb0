"""Where the ranks of a gang go: what they ask for, what the cluster has, and a placement group for them."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from cluster.failures import GangStopped
from conf.errors import ResourceError
from conf.schema import ClusterConfig

WAIT_SLICE_SEC = 0.5
PATIENCE_SEC = 20.0  # for one number of ranks to become free, before a smaller one is tried
PROBE_SEC = 1.0


@dataclass(frozen=True)
class Sizes:
    """The numbers of ranks that a gang may have, the best first; ``refused`` says what is wrong with those between."""

    legal: tuple[int, ...]
    refused: str = ""


@dataclass(frozen=True)
class Node:
    """A live machine of the cluster and its logical resources."""

    host: str
    cpus: float
    gpus: float

    def fits(self, cluster: ClusterConfig) -> int:
        """Return how many ranks fit here when nothing else runs."""
        most = cluster.ranks
        if cluster.cpus_per_rank > 0:
            most = min(most, int((self.cpus + 1e-6) / cluster.cpus_per_rank))
        if cluster.gpus_per_rank > 0:
            most = min(most, int((self.gpus + 1e-6) / cluster.gpus_per_rank))
        return most


def supply() -> list[Node]:
    """Return the live nodes of the connected cluster."""
    found = []
    for entry in ray.nodes():
        if entry["Alive"]:
            resources = entry["Resources"]
            found.append(Node(entry["NodeManagerHostname"], resources.get("CPU", 0.0), resources.get("GPU", 0.0)))
    return found


def capacity(cluster: ClusterConfig, nodes: list[Node]) -> int:
    """Return how many ranks fit on ``nodes`` when nothing else runs, at most ``cluster.ranks``."""
    fits = [node.fits(cluster) for node in nodes]
    if cluster.placement == "STRICT_PACK":
        return max(fits, default=0)
    if cluster.placement == "STRICT_SPREAD":
        return sum(fit > 0 for fit in fits)
    return min(sum(fits), cluster.ranks)


def place(
    cluster: ClusterConfig, sizes: Sizes, name: str, *, patient: bool = False, stopping: Callable[[], bool]
) -> tuple[PlacementGroup, int]:
    """Reserve one bundle a rank, for as many ranks of ``sizes`` as the live machines hold; return their number too.

    Waits at most ``cluster.start_timeout_sec`` for other work to end and, if ``patient``, for machines to come back.
    Machines that die meanwhile are no longer counted on.

    Raises:
        ResourceError: it can never fit, or did not become free in time.
        GangStopped: ``stopping()`` became true while waiting.
    """
    deadline = time.monotonic() + cluster.start_timeout_sec
    while True:
        nodes = supply()
        room = capacity(cluster, nodes)
        fitting = [size for size in sizes.legal if size <= room]
        for size in fitting:
            until = deadline if size == fitting[-1] else min(deadline, time.monotonic() + PATIENCE_SEC)
            group = placement_group(_bundles(cluster, size), strategy=cluster.placement, name=name)
            for _ in _slices(until, stopping, group):
                if group.wait(WAIT_SLICE_SEC):
                    return group, size
                if capacity(cluster, supply()) < size:
                    break
            remove_placement_group(group)
        if time.monotonic() > deadline or not (fitting or patient):
            raise _not_free(cluster) if fitting else _too_small(cluster, sizes, nodes)
        for _ in _slices(time.monotonic() + WAIT_SLICE_SEC, stopping):
            time.sleep(WAIT_SLICE_SEC)


def _slices(until: float, stopping: Callable[[], bool], group: PlacementGroup | None = None) -> Iterator[None]:
    """Yield until the time has come; give ``group`` back when a stop is requested meanwhile."""
    while True:
        yield
        if stopping():
            if group is not None:
                remove_placement_group(group)
            raise GangStopped
        if time.monotonic() > until:
            return


def _bundles(cluster: ClusterConfig, ranks: int) -> list[dict[str, float]]:
    bundle: dict[str, float] = {"CPU": cluster.cpus_per_rank, "GPU": cluster.gpus_per_rank}
    bundle = {resource: amount for resource, amount in bundle.items() if amount > 0} or {"CPU": 0.001}
    return [dict(bundle) for _ in range(ranks)]


def room_to_grow(cluster: ClusterConfig, ranks: int, sizes: Sizes) -> int:
    """Return the largest legal number above ``ranks`` for which the cluster has live machines that are free, or 0."""
    most = capacity(cluster, supply())
    for size in sizes.legal:
        if ranks < size <= most:
            group = placement_group(_bundles(cluster, size - ranks), strategy=cluster.placement)
            free = group.wait(PROBE_SEC)
            remove_placement_group(group)
            if free:
                return size
    return 0


def _too_small(cluster: ClusterConfig, sizes: Sizes, nodes: list[Node]) -> ResourceError:
    """Demand beside supply."""
    most = capacity(cluster, nodes)
    demand = f"{cluster.cpus_per_rank:g} CPU" + (f" + {cluster.gpus_per_rank:g} GPU" if cluster.gpus_per_rank else "")
    table = "".join(
        f"\n        {node.host:<24} {node.cpus:>5g} CPU {node.gpus:>3g} GPU   fits {node.fits(cluster)}"
        for node in nodes
    )
    legal = ""
    if len(sizes.legal) > 1 or sizes.refused:
        legal = f"\n        numbers of ranks that make a mesh: {', '.join(map(str, sizes.legal))}{sizes.refused}"
    fix = f"cluster.ranks={most}, more nodes" if most else "more or bigger nodes"
    return ResourceError(
        "cluster.ranks",
        cluster.ranks,
        f"each rank needs {demand} ({cluster.placement}), and {most} fit on this cluster:{table}{legal}",
        f"{fix}, or a smaller cluster.cpus_per_rank (fractions share a CPU)",
    )


def _not_free(cluster: ClusterConfig) -> ResourceError:
    free: dict[str, Any] = ray.available_resources()
    total = ray.cluster_resources()
    usage = ", ".join(
        f"{free.get(kind, 0):g} of {total.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU") if total.get(kind)
    )
    return ResourceError(
        "cluster.ranks",
        cluster.ranks,
        f"the ranks would fit, but were not free within {cluster.start_timeout_sec:g} s; free now: {usage}",
        "wait for other work on the cluster to end (`ray list placement-groups`), or fewer cluster.ranks",
    )

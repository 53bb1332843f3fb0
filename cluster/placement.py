"""Where the ranks of a gang go: what they ask for, what the cluster has, and a placement group for them."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import placement_group, remove_placement_group
from ray.util.placement_group import PlacementGroup

from cluster.failures import GangStopped
from conf.errors import ResourceError
from conf.schema import ClusterConfig

WAIT_SLICE_SEC = 0.5


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


def check_supply(cluster: ClusterConfig, nodes: list[Node]) -> None:
    """Raise ResourceError, with demand beside supply, if the ranks can never fit on ``nodes``."""
    fits = [node.fits(cluster) for node in nodes]
    if cluster.placement == "STRICT_PACK":
        most = max(fits, default=0)
    elif cluster.placement == "STRICT_SPREAD":
        most = sum(fit > 0 for fit in fits)
    else:
        most = sum(fits)
    if most >= cluster.ranks:
        return
    demand = f"{cluster.cpus_per_rank:g} CPU" + (f" + {cluster.gpus_per_rank:g} GPU" if cluster.gpus_per_rank else "")
    table = "".join(
        f"\n        {node.host:<24} {node.cpus:>5g} CPU {node.gpus:>3g} GPU   fits {fit}"
        for node, fit in zip(nodes, fits, strict=True)
    )
    fix = f"cluster.ranks={most}, more nodes" if most else "more or bigger nodes"
    raise ResourceError(
        "cluster.ranks",
        cluster.ranks,
        f"each rank needs {demand} ({cluster.placement}), and {most} fit on this cluster:{table}",
        f"{fix}, or a smaller cluster.cpus_per_rank (fractions share a CPU)",
    )


def place(cluster: ClusterConfig, name: str, stopping: Callable[[], bool]) -> PlacementGroup:
    """Reserve one bundle a rank; wait for it at most ``cluster.start_timeout_sec``.

    Raises:
        ResourceError: it can never fit, or did not become free in time.
        GangStopped: ``stopping()`` became true while waiting.
    """
    check_supply(cluster, supply())
    bundle: dict[str, float] = {"CPU": cluster.cpus_per_rank, "GPU": cluster.gpus_per_rank}
    bundle = {resource: amount for resource, amount in bundle.items() if amount > 0} or {"CPU": 0.001}
    group = placement_group([dict(bundle) for _ in range(cluster.ranks)], strategy=cluster.placement, name=name)
    deadline = time.monotonic() + cluster.start_timeout_sec
    try:
        while not group.wait(WAIT_SLICE_SEC):
            if stopping():
                raise GangStopped
            if time.monotonic() > deadline:
                raise _not_free(cluster)
    except BaseException:
        remove_placement_group(group)
        raise
    return group


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

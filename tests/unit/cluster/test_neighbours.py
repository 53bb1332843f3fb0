"""What ``sundog doctor`` sees of a running cluster."""

from dataclasses import replace
from pathlib import Path

import ray

from cluster.connection import Connection
from cluster.neighbours import look
from cluster.wire import Disk
from conf.schema import ClusterConfig


def test_every_machine_of_a_cluster_is_looked_at(
    ray_cluster: Connection, cluster: ClusterConfig, tmp_path: Path
) -> None:
    (machine,) = look(replace(cluster, address=ray_cluster.address), str(tmp_path))
    assert machine.ray == ray.__version__
    assert abs(machine.clock_sec) <= machine.clock_error_sec + 1e-3, "it is this machine"
    assert isinstance(machine.disk, Disk)
    assert machine.rate is None, "there is no other machine"
    (machine,) = look(replace(cluster, address=ray_cluster.address), str(tmp_path / "none"))
    assert "No such file" in str(machine.disk)

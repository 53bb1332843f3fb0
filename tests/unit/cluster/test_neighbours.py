"""What ``sundog doctor`` sees of a running cluster."""

import os
import platform
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from cluster import neighbours
from cluster.connection import Connection, takes_any_client
from cluster.neighbours import Machine, Silent, look
from cluster.wire import Disk
from conf.schema import ClusterConfig


def test_every_machine_of_a_cluster_is_looked_at(
    ray_cluster: Connection, cluster: ClusterConfig, tmp_path: Path
) -> None:
    (machine,) = look(replace(cluster, address=ray_cluster.address), str(tmp_path))
    assert isinstance(machine, Machine)
    assert machine.host.startswith(f"{platform.node()} (")
    assert machine.ray == ray.__version__
    assert machine.cpus == ray.cluster_resources()["CPU"]
    assert machine.memory == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert abs(machine.clock_sec) <= machine.clock_error_sec + 1e-3, "it is this machine"
    assert isinstance(machine.disk, Disk)
    assert machine.rate is None, "there is no other machine"
    (machine,) = look(replace(cluster, address=ray_cluster.address), str(tmp_path / "none"))
    assert isinstance(machine, Machine)
    assert "No such file" in str(machine.disk)


def test_links_form_a_ring_and_a_dead_one_says_why(ray_cluster: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    probes = [neighbours._start(node["NodeID"]) for _ in range(3)]
    rates = neighbours._rates([0, 1, 2], probes, [node] * 3)
    assert [isinstance(rate, float) and rate > 1e6 for rate in rates.values()] == [True] * 3
    rates = neighbours._rates([0, 1], probes, [node, {**node, "NodeManagerAddress": "no-such-host.invalid"}])
    assert "no-such-host.invalid: " in str(rates[0])
    assert isinstance(rates[1], float)
    for probe in probes:
        ray.kill(probe)


def test_a_machine_without_an_answer_holds_nobody_up(
    ray_cluster: Connection, cluster: ClusterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "ANSWER_SEC", 0.0)
    (silent,) = look(replace(cluster, address=ray_cluster.address), ".")
    assert isinstance(silent, Silent)
    assert "no answer in 0 s" in silent.reason


def test_a_cluster_with_a_token_takes_not_any_client(ray_cluster: Connection) -> None:
    assert not takes_any_client(ray_cluster.address)

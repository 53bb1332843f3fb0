"""Elastic runs on a cluster of two real nodes, each with a raylet of its own, that go and come back."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.nodes import Nodes
from cluster.elastic import legal_sizes, with_ranks
from cluster.supervisor import read_attempts, supervise
from conf.errors import ConfigError, ResourceError
from conf.rules import check, mesh_sizes
from conf.schema import ClusterConfig, RunConfig, TrainerConfig

COUNT = "tests.helpers.ranks:count"


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with Nodes(2, 1) as started:
        yield started


def make_config(folder: Path, nodes: Nodes, **changes: Any) -> RunConfig:
    cluster = ClusterConfig(address=nodes.address, ranks=2, start_timeout_sec=120.0, **changes)
    return RunConfig(run_dir=str(folder), cluster=cluster, trainer=TrainerConfig(steps=100_000))


def test_a_run_goes_on_with_fewer_ranks_and_grows_when_the_node_is_back(nodes: Nodes, tmp_path: Path) -> None:
    config = make_config(tmp_path, nodes, min_ranks=1)
    worlds: list[int] = []

    def watch(event: dict[str, Any]) -> None:
        if event["kind"] != "metrics":
            return
        if event["world"] not in worlds[-1:]:
            worlds.append(event["world"])
            if worlds == [2]:
                nodes.kill(1)
            elif worlds == [2, 1]:
                nodes.start(1)

    result = supervise(config, COUNT, on_event=watch, stop=lambda: int(worlds == [2, 1, 2]))
    assert (result["status"], worlds) == ("stopped", [2, 1, 2])
    records = read_attempts(tmp_path)
    started = [record for record in records if record["event"] == "started"]
    assert [len(record["ranks"]) for record in started] == [2, 1, 2]
    assert [record["event"] for record in records if record["event"] != "started"] == ["failed", "resized", "stopped"]
    steps = [int(line) for line in (tmp_path / "steps").read_text().split()]
    assert steps == list(range(1, result["step"] + 1)), "no step lost or done twice"


def test_a_run_of_fixed_size_waits_for_its_node(nodes: Nodes, tmp_path: Path) -> None:
    nodes.await_nodes(2)
    config = make_config(tmp_path, nodes)
    seen: list[int] = []

    def watch(event: dict[str, Any]) -> None:
        if event["kind"] == "metrics" and not seen:
            nodes.kill(2)
            seen.append(event["step"])
        elif event["kind"] == "log" and "restart" in event["message"]:
            nodes.start(2)
        elif event["kind"] == "metrics" and len(read_attempts(tmp_path)) > 2:
            seen.append(event["step"])

    result = supervise(config, COUNT, on_event=watch, stop=lambda: int(len(seen) > 1))
    assert result["status"] == "stopped"
    started = [record for record in read_attempts(tmp_path) if record["event"] == "started"]
    assert [len(record["ranks"]) for record in started] == [2, 2]


def test_a_cluster_with_room_for_no_legal_mesh_is_refused_with_the_reasons(nodes: Nodes, tmp_path: Path) -> None:
    config = make_config(tmp_path, nodes, min_ranks=3)
    config.cluster.ranks, config.trainer.batch = 4, 4
    with pytest.raises(ResourceError) as caught:
        supervise(config, COUNT)
    assert "2 fit on this cluster" in caught.value.rule
    assert "not 3: " in caught.value.rule


def test_legal_sizes_follow_the_rules_and_keep_the_global_batch() -> None:
    config = RunConfig(cluster=ClusterConfig(ranks=8, min_ranks=1))
    config.sequence.degree, config.trainer.batch = 2, 8
    sizes = legal_sizes(check(config))
    assert sizes.legal == (8, 4, 2)
    for ranks in sizes.legal:
        mesh = mesh_sizes(with_ranks(config, ranks))
        assert (mesh.cp, mesh.dp) == (2, ranks // 2)
    assert "not 6: trainer.batch = 8" in sizes.refused
    assert "not 7: sequence.degree = 2" in sizes.refused
    config.cluster.min_ranks = 9
    with pytest.raises(ConfigError, match=r"cluster\.min_ranks"):
        check(config)

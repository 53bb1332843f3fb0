"""The planner's measurements on gloo ranks, and ``sequence=auto`` from them."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from conf.rules import mesh_sizes
from conf.schema import RunConfig
from parallel.mesh import build_mesh
from parallel.plan.probe import measure_links
from parallel.strategies import find_strategy
from tests.helpers.dist import run_distributed
from trainers.sequence import FILE_NAME, resolve_sequence


def _resolve(rank: int, world_size: int, run_dir: str) -> tuple[str, str, str, str, float]:
    config = RunConfig(run_dir=run_dir)
    config.cluster.ranks, config.data.context = world_size, 96
    config.sequence.strategy = "auto"
    mesh = build_mesh(mesh_sizes(config), "cpu")
    device = torch.device("cpu")
    chosen, text = resolve_sequence(config, mesh, device)
    group = dist.group.WORLD
    assert group is not None
    links = measure_links(group, device)
    return chosen.sequence.strategy, chosen.sequence.backward, text, links.kind, links.speed.bandwidth


def test_all_ranks_measure_the_same_and_choose_alike(tmp_path: Path):
    results = run_distributed(_resolve, 3, str(tmp_path))
    assert len({str(result) for result in results}) == 1
    forward, backward, text, kind, bandwidth = results[0]
    assert kind in ("port", "mesh")  # loopback sockets: three ranks cannot tell a ring from a mesh
    assert bandwidth > 0
    assert f"* {forward}" in text
    assert f"* {backward}" in text
    record = json.loads((tmp_path / FILE_NAME).read_text())
    assert record["chosen"] == {"forward": forward, "backward": backward}
    assert record["measured"]["rank_gflops"] > 0
    assert not find_strategy(forward).single
    assert {c["strategy"] for c in record["candidates"]} >= {"ring", "token_ring", "bidirectional_query"}

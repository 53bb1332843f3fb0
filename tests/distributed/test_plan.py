"""The planner's measurements on gloo ranks, and ``sequence=auto`` from them."""

import json
from pathlib import Path

import torch
import torch.distributed as dist

from conf.rules import mesh_sizes
from conf.schema import RunConfig
from fused.mask import FULL
from parallel.attention import attend
from parallel.mesh import Mesh, build_mesh
from parallel.plan.probe import measure_links
from parallel.ring.trace import recording
from parallel.strategies import find_strategy
from tests.helpers.dist import run_distributed
from trainers.plots import timeline
from trainers.report import TIMELINE_FILE
from trainers.sequence import FILE_NAME, resolve_sequence
from trainers.timeline import exposed, save_timeline


def _trace(group: dist.ProcessGroup, mesh: Mesh, run_dir: str) -> None:
    """A recorded call is the same call; its timeline has what its schedule has."""
    q, k, v = (torch.randn(1, 32, 4, 8, requires_grad=True) for _ in range(3))

    def call() -> torch.Tensor:
        return attend(q, k, v, group=group, strategy="ring", layout="contiguous", mask=FULL)

    plain = call()
    with recording() as recorder:
        out = call()
        out.sum().backward()
    assert torch.equal(plain, out)
    assert [made.direction for made in recorder.calls] == ["forward", "backward"]
    for made in recorder.calls:
        count = {name: sum(s.activity == name for s in made.spans) for name in ("compute", "wait", "send", "receive")}
        assert count["compute"] >= 3  # a block with each rank's keys
        assert count["receive"] >= 2
        assert count["send"] >= 2
        assert all(0 <= span.start <= span.end <= made.now() for span in made.spans)
    assert exposed(recorder)["ring/exposed_comm_ms"] > 0
    call()
    assert len(recorder.calls) == 2
    save_timeline(recorder, run_dir, 7, mesh)


def _resolve(rank: int, world_size: int, run_dir: str) -> tuple[str, str, str, str, float]:
    config = RunConfig(run_dir=run_dir)
    config.cluster.ranks, config.data.context = world_size, 96
    config.sequence.strategy = "auto"
    mesh = build_mesh(mesh_sizes(config), "cpu")
    device = torch.device("cpu")
    chosen, text = resolve_sequence(config, mesh, device)
    group = dist.group.WORLD
    assert group is not None
    _trace(group, mesh, run_dir)
    links = measure_links(group, device)
    return chosen.sequence.strategy, chosen.sequence.backward, text, links.kind, links.speed.bandwidth


def test_all_ranks_measure_trace_and_choose_alike(tmp_path: Path):
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
    drawn = json.loads((tmp_path / TIMELINE_FILE).read_text())
    assert drawn["step"] == 7
    assert len(drawn["ranks"]) == 3
    figure = timeline(drawn)
    assert figure is not None
    bars = sum(len(axes.patches) for axes in figure.axes)
    assert bars == sum(len(spans) for rank in drawn["ranks"] for spans in rank.values())


def test_no_timeline_no_picture():
    assert timeline({}) is None
    assert timeline({"ranks": [{}]}) is None

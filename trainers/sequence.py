"""``sequence=auto``: measure the links and one block, let the planner choose, on all ranks alike."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conf.schema import RunConfig
from data.files import write_atomic
from parallel.mesh import Mesh
from parallel.plan.choose import DIRECTIONS, Plan, explain
from parallel.plan.probe import measure_blocks, measure_links
from parallel.plan.replay import Machine, Machines
from parallel.plan.run import GBIT, plan_run, stated_topology
from parallel.plan.topology import TOPOLOGIES, Kind, Topology

FILE_NAME = "sequence.json"  # in the run folder
PROBE_TOKENS = 512  # of the timed block, at most


def _links(config: RunConfig, mesh: Mesh, device: torch.device) -> Topology:
    kind: Kind | None = next((kind for kind in TOPOLOGIES if kind == config.sequence.topology), None)
    if kind is not None and config.sequence.link_gbit > 0:
        return stated_topology(config)
    return measure_links(mesh.cp_group, device, kind)


def _machines(config: RunConfig, mesh: Mesh, device: torch.device) -> Machines:
    if config.sequence.rank_tflops > 0:
        return dict.fromkeys(DIRECTIONS, Machine(config.sequence.rank_tflops * 1e12))
    model = config.model
    head_dim = model.head_dim or model.dim // model.heads
    dtype = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
    tokens = min(PROBE_TOKENS, config.data.context // mesh.cp_size)
    return measure_blocks(tokens, (model.heads, model.kv_heads, head_dim), dtype, device, mesh.cp_group)


def _facts(topology: Topology, machines: Machines) -> dict[str, Any]:
    fabric = topology.fabric
    return {
        "topology": topology.kind,
        "ranks": topology.size,
        "island": topology.island,
        "link_gbit": topology.speed.bandwidth / GBIT,
        "link_latency_ms": 1e3 * topology.speed.latency,
        "fabric_gbit": fabric.bandwidth / GBIT if fabric else 0.0,
        "rank_gflops": machines["forward"].flops / 1e9,
        "rank_gflops_backward": machines["backward"].flops / 1e9,
        "block_ms": 1e3 * machines["forward"].block,
    }


def resolve_sequence(config: RunConfig, mesh: Mesh, device: torch.device) -> tuple[RunConfig, str]:
    """The config with a strategy instead of ``auto``, the same on all ranks, and what rank 0 has to say about it.

    Collective over all ranks of the mesh. Rank 0 of the run decides, for what it and its group measured, and records
    the choice in the run folder. With another strategy than ``auto`` the config comes back as it is.
    """
    if config.sequence.strategy != "auto":
        return config, ""
    if mesh.cp_size == 1:
        return replace(config, sequence=replace(config.sequence, strategy="local")), ""
    topology, machines = _links(config, mesh, device), _machines(config, mesh, device)
    found: list[Any] = [None, None, None]
    if dist.get_rank() == 0:
        plan = plan_run(config, topology, machines)
        found = [plan.forward, plan.backward, _record(config, plan, topology, machines)]
    dist.broadcast_object_list(found, 0)
    forward, backward, text = found
    return replace(config, sequence=replace(config.sequence, strategy=forward, backward=backward)), text


def _record(config: RunConfig, plan: Plan, topology: Topology, machines: Machines) -> str:
    facts = _facts(topology, machines)
    candidates = [asdict(candidate) for candidate in plan.candidates]
    chosen = {"forward": plan.forward, "backward": plan.backward}
    record = {"chosen": chosen, "measured": facts, "candidates": candidates}
    write_atomic(Path(config.run_dir) / FILE_NAME, json.dumps(record, indent=1) + "\n")
    links = f"{facts['topology']}, {facts['link_gbit']:.3g} Gbit/s each way, {facts['rank_gflops']:.3g} GFLOP/s a rank"
    return explain(plan, {"links": links})

"""How much of computing and communication overlaps when both take equally long.

    python -m benchmarks.overlap [--quick] [--json FILE] [--mbit RATE] [--ranks N] [--rounds N]

Ranks are joined as neighbours or as a mesh (:mod:`benchmarks.netns`, needs root). A block waits instead of computing,
for a time in proportion to its pairs, as the host does while an accelerator is at work: the cores that all ranks share
would else decide. That time is chosen so that a rank's blocks together take as long as the busiest link needs for its
bytes. Nothing can take less than either; what comes on top is the tail, the block of what arrives last.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import netns, peers
from benchmarks.links import Cell
from benchmarks.table import alternate
from fused.block import accumulation_dtype
from fused.mask import FULL
from parallel.attention import attend
from parallel.plan.cost import weigh
from parallel.plan.replay import link_loads
from parallel.plan.topology import Kind, Speed, Topology
from parallel.ring import workers
from parallel.strategies import find_strategy
from tests.helpers.dist import run_distributed

BOUND = 1.1  # of the larger of computing and communication, the tail besides
STRATEGIES: dict[str, Kind] = {
    "ring": "ring",
    "bidirectional_ring": "ring",
    "bidirectional_query": "ring",
    "token_ring": "mesh",
}


@dataclass(frozen=True)
class Row:
    strategy: str
    direction: str
    each_ms: float  # computing of one rank, and communication of the busiest link: chosen equal
    tail_ms: float
    measured_ms: float

    @property
    def over(self) -> float:
        """What was measured, less the tail, over either of the two."""
        return (self.measured_ms - self.tail_ms) / self.each_ms


def cell_of(strategy: str, ranks: int) -> Cell:
    return Cell(STRATEGIES[strategy], ranks, 64 * ranks, 64 * ranks, heads=8, kv_heads=8, head_dim=128)


def busiest_seconds(strategy: str, direction: str, cell: Cell, mbit: float) -> float:
    """What the busiest link needs for its bytes."""
    schedule, kind = getattr(find_strategy(strategy), direction)(cell.problem), STRATEGIES[strategy]
    loads = link_loads(weigh(schedule, cell.widths), Topology(kind, cell.ranks, Speed(1.0)))
    return float(loads.max()) / (mbit * 1e6 / 8)


def _wait_instead(seconds_a_pair: list[float]) -> None:
    """Blocks of this process wait from here on; the results are zeros."""

    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Any, scale: float, into: Any = None, dropout: Any = None) -> Any:
        time.sleep(seconds_a_pair[0] * q.shape[1] * k.shape[1])
        wide = accumulation_dtype(q.dtype)
        fresh = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide), q.new_zeros(q.shape[:3], dtype=wide)
        return fresh if into is None else into

    def backward(q: Tensor, k: Tensor, v: Tensor, *_: Any, dq: Any = None, dkv: Any = None, **__: Any) -> Any:
        time.sleep(seconds_a_pair[0] * q.shape[1] * k.shape[1])
        zeros = [torch.zeros_like(x, dtype=accumulation_dtype(x.dtype)) for x in (q, k, v)]
        return (zeros[0] if dq is None else dq, *(zeros[1:] if dkv is None else dkv))

    workers.block_forward, workers.block_backward = forward, backward


def _rank(rank: int, world_size: int, names: list[str], mbit: float, rounds: int) -> dict[str, dict[str, list[float]]]:
    pace = [0.0]
    _wait_instead(pace)
    found: dict[str, dict[str, list[float]]] = {}
    for name in names:
        cell = cell_of(name, world_size)
        layout, _ = cell.layouts
        q, k, v, d_out = (torch.randn(1, 64, 8, 128) for _ in range(4))

        def attention(q: Tensor, k: Tensor, v: Tensor, name: str = name, layout: Any = layout) -> Tensor:
            return attend(q, k, v, group=dist.group.WORLD, strategy=name, layout=layout, mask=FULL, timeout=120.0)

        variant = peers.autograd(attention, q, k, v, d_out)
        found[name] = {}
        for direction in ("forward", "backward"):
            pairs = cell.queries // world_size * cell.keys
            pace[0] = busiest_seconds(name, direction, cell, mbit) / pairs
            call: Callable[[], object] = getattr(variant, direction)
            found[name][direction] = alternate({name: call}, rounds, before=dist.barrier)[name].wall
    return found


def measure(names: list[str], ranks: int, mbit: float, rounds: int) -> list[Row]:
    """Strategies on one kind of links."""
    with netns.Network(STRATEGIES[names[0]], ranks, mbit) as network:
        by_rank = run_distributed(_rank, ranks, names, mbit, rounds, timeout=600, prepare=network.seat)
    rows: list[Row] = []
    for name in names:
        for direction in ("forward", "backward"):
            slowest = [max(r) for r in zip(*(rank[name][direction] for rank in by_rank), strict=True)]
            each = 1e3 * busiest_seconds(name, direction, cell_of(name, ranks), mbit)
            rows.append(Row(name, direction, each, each / ranks, 1e3 * statistics.median(slowest)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Overlap of computing and communication, both equally long")
    parser.add_argument("--quick", action="store_true", help="neighbour links only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--mbit", type=float, default=10.0, help="Mbit/s of every link, each way")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if reason := netns.available():
        parser.exit(3, f"shaped links cannot be made here: {reason}\n")
    rows: list[Row] = []
    for topology in ("ring",) if options.quick else ("ring", "mesh"):
        names = [name for name, kind in STRATEGIES.items() if kind == topology]
        rows += measure(names, options.ranks, options.mbit, options.rounds)
    print(f"{'':32}{'each ms':>9}{'tail ms':>9}{'took ms':>9}{'over':>7}   wanted at most {BOUND:g}")
    for row in rows:
        cells = f"{row.each_ms:>9.0f}{row.tail_ms:>9.0f}{row.measured_ms:>9.0f}{row.over:>7.2f}"
        print(f"{row.strategy:22}{row.direction:10}{cells}   {'reached' if row.over <= BOUND else 'missed'}")
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Sequence-parallel attention on links of a set bandwidth: all strategies and their peers, side by side.

    python -m benchmarks.links [--quick | --goals] [--json FILE] [--mbit RATE] [--rounds N] [--bucket]

Ranks are gloo processes in network namespaces of this machine (:mod:`benchmarks.netns`; needs root), joined as ports of
a switch, as a ring or as a full mesh of full-duplex links. The rate is low, so that links and not the cores decide:
what is measured is how many bytes a schedule sends where and when, not how fast a machine computes.

Everything runs in the same processes, round by round in turns; a time is the slowest rank's. What the interfaces
counted is compared, link by link, with what the schedules say. Without the privilege the ranks share loopback sockets
and the links are kept by a token bucket in the channel (:mod:`benchmarks.bucket`); peers, which do not use that
channel, and the interfaces' counters are then left out.
"""

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks import netns, peers
from benchmarks.bucket import Bucket, Pace
from benchmarks.peers import Variant
from benchmarks.table import alternate, median_ratio
from fused.mask import FULL as EVERYTHING
from parallel.attention import attend
from parallel.layout import Layout, contiguous
from parallel.plan.cost import weigh
from parallel.plan.replay import link_loads
from parallel.plan.topology import Speed, Topology
from parallel.ring import operator
from parallel.ring.problem import Problem
from parallel.ring.scene import plain_scene
from parallel.ring.traffic import Widths
from parallel.strategies import STRATEGIES, find_strategy
from tests.helpers.dist import run_distributed

BASELINE = "torch ring"
BOUND = 2e-5  # of the largest absolute difference from attention in one process, relative to its largest value
DIRECTIONS = ("forward", "backward")


@dataclass(frozen=True)
class Cell:
    """One problem on one network. Lengths are of the whole sequence."""

    topology: str
    ranks: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    strategies: tuple[str, ...] = ()  # all that split a sequence, where empty
    directions: tuple[str, ...] = DIRECTIONS

    def __str__(self) -> str:
        lengths = f"{self.queries}" if self.queries == self.keys else f"{self.queries} of {self.keys}"
        heads = f"heads {self.heads}:{self.kv_heads} x {self.head_dim}"
        return f"{self.ranks} ranks, {self.topology}: {lengths} tokens, {heads}"

    @property
    def layouts(self) -> tuple[Layout, Layout]:
        """Of queries, which are the last tokens of the sequence, and of keys."""
        queries = contiguous(self.queries, self.ranks).shifted(self.keys - self.queries)
        return queries, contiguous(self.keys, self.ranks)

    @property
    def problem(self) -> Problem:
        return plain_scene(*self.layouts, EVERYTHING, self.heads, self.kv_heads).problem

    @property
    def widths(self) -> Widths:
        return Widths(1, self.head_dim, self.head_dim, element_bytes=4)


def _multi_head(topology: str, ranks: int = 8, strategies: tuple[str, ...] = ()) -> Cell:
    return Cell(topology, ranks, 64 * ranks, 64 * ranks, heads=8, kv_heads=8, head_dim=128, strategies=strategies)


def _cached(topology: str, strategies: tuple[str, ...] = ()) -> Cell:
    return Cell(topology, 4, 256, 4096, 16, 4, head_dim=32, strategies=strategies, directions=("forward",))


QUICK = [Cell("ring", 4, 1024, 1024, 4, 4, 32, strategies=("ring", "token_ring", "bidirectional_query"))]
FULL = [
    *(_multi_head(topology) for topology in netns.TOPOLOGIES),
    *(_cached(topology) for topology in netns.TOPOLOGIES),
    _multi_head("mesh", 4),
    *(Cell(topology, 4, 2048, 2048, heads=16, kv_heads=4, head_dim=32) for topology in netns.TOPOLOGIES),
]


@dataclass(frozen=True)
class Goal:
    """How many times faster than torch's ring a cell's strategies are to be, forward and backward."""

    cell: Cell
    forward: tuple[str, float]
    backward: tuple[str, float] = ("", 0.0)


def _goal(topology: str, forward: tuple[str, float], backward: tuple[str, float], ranks: int = 8) -> Goal:
    names = tuple(dict.fromkeys((forward[0], backward[0])))
    return Goal(_multi_head(topology, ranks, names), forward, backward)


GOALS = [
    _goal("ring", ("bidirectional_ring", 1.9), ("bidirectional_query", 2.8)),
    _goal("port", ("tile:4", 1.5), ("tile:4", 2.0)),
    _goal("mesh", ("allgather", 4.5), ("allgather_query", 6.0)),
    _goal("mesh", ("token_ring", 1.15), ("token_ring", 1.7), ranks=4),
    Goal(_cached("port", ("token_ring",)), ("token_ring", 4.0)),
    Goal(_cached("ring", ("bidirectional_query",)), ("bidirectional_query", 7.0)),
]


def _shards(cell: Cell, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and d_out, whole and this rank's part."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((cell.queries, cell.heads), *(((cell.keys, cell.kv_heads),) * 2), (cell.queries, cell.heads))
    whole = [torch.randn(1, length, heads, cell.head_dim, generator=generator) for length, heads in shapes]
    return whole, [x.chunk(cell.ranks, 1)[rank].contiguous() for x in whole]


def _exact(cell: Cell, rank: int, whole: list[Tensor]) -> list[Tensor]:
    """This rank's part of out, dq, dk and dv, by one process."""
    q, k, v = (x.transpose(1, 2).requires_grad_() for x in whole[:3])
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=cell.heads != cell.kv_heads)
    gradients = torch.autograd.grad(out, (q, k, v), whole[3].transpose(1, 2))
    return [x.detach().transpose(1, 2).chunk(cell.ranks, 1)[rank] for x in (out, *gradients)]


def ours(cell: Cell) -> tuple[str, ...]:
    """Names of our strategies that a cell is measured with."""
    tiles = tuple(f"tile:{row}" for row in range(2, cell.ranks) if cell.ranks % row == 0)
    plain = tuple(name for name, strategy in STRATEGIES.items() if not strategy.single and name != "tile")
    return cell.strategies or plain + tiles


def _variants(cell: Cell, rank: int, peer_count: int) -> dict[str, Variant]:
    """What is timed, by name; ours and peers' results are compared with attention in one process first. The first of
    the peers is torch's ring.

    Raises:
        AssertionError: a strategy of ours is wrong. A peer that is wrong is timed all the same, under a name that says
            so.
    """
    whole, local = _shards(cell, rank)
    q, k, v, d_out = local
    exact = _exact(cell, rank, whole)
    found: dict[str, Variant | None] = {}
    for name in ours(cell):

        def attention(q: Tensor, k: Tensor, v: Tensor, name: str = name) -> Tensor:
            layout, key_layout = cell.layouts
            return attend(
                *(q, k, v),
                group=dist.group.WORLD,
                strategy=name,
                layout=layout,
                key_layout=key_layout,
                mask=EVERYTHING,
                timeout=120.0,
            )

        found[name] = peers.autograd(attention, q, k, v, d_out)
    if peer_count > 0:
        found[BASELINE] = peers.torch_ring(q, k, v, d_out, "alltoall")
    if peer_count > 1:
        found["torch allgather"] = peers.torch_ring(q, k, v, d_out, "allgather")
        found["ring-attention-pytorch"] = peers.ring_attention_pytorch(q, k, v, d_out)
    variants: dict[str, Variant] = {}
    for name, variant in found.items():
        if variant is not None:
            wrong = _wrong(variant, exact, cell.directions)
            assert not wrong or name not in ours(cell), f"{cell}: {name} is wrong: {wrong}"
            variants[f"{name} (wrong {wrong})" if wrong else name] = variant
    return variants


def _wrong(variant: Variant, exact: list[Tensor], directions: tuple[str, ...]) -> str:
    """Names of the results that are wrong on any rank."""
    results = [variant.forward(), *(variant.backward() if "backward" in directions else [])]
    errors = [(x - truth).abs().max() / truth.abs().max() for x, truth in zip(results, exact, strict=False)]
    largest = torch.stack(errors)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return ", ".join(
        n for n, error in zip(("out", "dq", "dk", "dv"), largest.tolist(), strict=False) if not error <= BOUND
    )


@dataclass(frozen=True)
class Measured:
    """One variant in one direction on one rank."""

    seconds: list[float]  # by round
    payload: dict[str, int]  # bytes sent by interface, headers of packets left out
    raw: dict[str, int]  # all bytes sent by interface


def _count(run: Callable[[], object]) -> tuple[dict[str, int], dict[str, int]]:
    dist.barrier()
    before = netns.sent()
    run()
    dist.barrier()
    after = netns.sent()
    payload = {name: after[name].payload - before[name].payload for name in after}
    return payload, {name: after[name].size - before[name].size for name in after}


def _keep_pace(bucket: Path, cell: Cell, mbit: float, rank: int) -> None:
    """From here on the engine's channels are held to the links of a token bucket."""
    topology: Any = cell.topology
    pace = Pace(Bucket(bucket, Topology(topology, cell.ranks, Speed(mbit * 1e6 / 8))), rank)
    plain = operator.GroupChannel

    def paced(*arguments: Any) -> Any:
        return pace.channel(plain(*arguments))

    operator.GroupChannel = cast(Any, paced)


def _rank(
    rank: int, world_size: int, cell: Cell, mbit: float, rounds: int, peer_count: int, bucket: Path | None
) -> dict[str, dict[str, Measured]]:
    if bucket is not None:
        _keep_pace(bucket, cell, mbit, rank)
    variants = _variants(cell, rank, peer_count if bucket is None else 0)
    found: dict[str, dict[str, Measured]] = {}
    for direction in cell.directions:
        calls = {name: getattr(variant, direction) for name, variant in variants.items()}
        counts = {name: _count(call) if bucket is None else ({}, {}) for name, call in calls.items()}
        times = alternate(calls, rounds, before=dist.barrier)
        found[direction] = {name: Measured(times[name].wall, *counts[name]) for name in calls}
    return found


@dataclass(frozen=True)
class Row:
    """One variant in one direction on one cell. ``ratio``: torch's ring (our ring in a bucket) over this."""

    cell: str
    topology: str
    direction: str
    variant: str
    ms: float
    ratio: float
    busiest_kb: float  # payload of the link that carries most
    overhead: float  # headers of packets over payload
    formula_error: float | None  # of the formula's bytes, on the link where it is most wrong; None for peers


def _link(cell: Cell, rank: int, interface: str) -> int | None:
    """The topology's number of the directed link that an interface sends on."""
    if interface.startswith("to"):
        return rank * cell.ranks + int(interface.removeprefix("to"))
    if interface == "prev" and cell.ranks > 2:
        return cell.ranks + rank
    carries = interface in ("next", "prev") or (cell.topology == "port" and interface == "fab0")
    return rank if carries else None


def _formula_error(cell: Cell, name: str, direction: str, ranks: list[Measured]) -> float | None:
    """How far the schedule's bytes are from what the interfaces counted, over the busiest link's bytes."""
    if name not in ours(cell) or not ranks[0].payload:
        return None
    schedule = getattr(find_strategy(name), direction)(cell.problem)
    topology: Any = cell.topology
    loads = link_loads(weigh(schedule, cell.widths), Topology(topology, cell.ranks, Speed(1.0)))
    counted = [
        (link, payload)
        for rank, measured in enumerate(ranks)
        for interface, payload in measured.payload.items()
        if (link := _link(cell, rank, interface)) is not None
    ]
    return max(abs(payload - loads[link]) for link, payload in counted) / max(loads)


def _on_ranks(
    cell: Cell, mbit: float, rounds: int, peer_count: int, bucket: bool
) -> list[dict[str, dict[str, Measured]]]:
    if bucket:
        with tempfile.TemporaryDirectory(prefix="links-") as folder:
            settings = (cell, mbit, rounds, 0, Path(folder, "bucket"))
            return run_distributed(_rank, cell.ranks, *settings, timeout=900)
    with netns.Network(cell.topology, cell.ranks, mbit) as network:
        settings = (cell, mbit, rounds, peer_count, None)
        return run_distributed(_rank, cell.ranks, *settings, timeout=900, prepare=network.seat)


def measure(cell: Cell, mbit: float, rounds: int, peer_count: int = 3, bucket: bool = False) -> list[Row]:
    """Build the network, run all variants, take it down."""
    by_rank = _on_ranks(cell, mbit, rounds, peer_count, bucket)
    baseline = "ring" if bucket else BASELINE
    rows: list[Row] = []
    for direction in cell.directions:
        measured = {name: [rank[direction][name] for rank in by_rank] for name in by_rank[0][direction]}
        wall = {n: [max(r) for r in zip(*(m.seconds for m in ms), strict=True)] for n, ms in measured.items()}
        for name, ranks in measured.items():
            payload = [size for rank in ranks for size in rank.payload.values()]
            raw = [size for rank in ranks for size in rank.raw.values()]
            rows.append(
                Row(
                    *(str(cell), cell.topology, direction, name),
                    ms=1000 * statistics.median(wall[name]),
                    ratio=median_ratio(wall[name], wall[baseline]),
                    busiest_kb=max(payload, default=0) / 1000,
                    overhead=sum(raw) / sum(payload) - 1 if payload else 0.0,
                    formula_error=_formula_error(cell, name, direction, ranks),
                )
            )
    return rows


def show(rows: list[Row]) -> None:
    for cell in dict.fromkeys(row.cell for row in rows):
        some = [row for row in rows if row.cell == cell]
        print(f"\n{cell}")
        for direction in dict.fromkeys(row.direction for row in some):
            print(f"  {direction:38}{'ms':>8}{'ratio':>8}{'busiest kB':>12}{'formula':>10}{'headers':>9}")
            for row in (row for row in some if row.direction == direction):
                formula = "" if row.formula_error is None else f"{row.formula_error:+.1%}"
                print(
                    f"  {row.variant:38}{row.ms:>8.0f}{row.ratio:>8.2f}{row.busiest_kb:>12.0f}"
                    f"{formula:>10}{row.overhead:>9.1%}"
                )


def judge(goal: Goal, rows: list[Row]) -> str:
    """What a goal asks for beside what was measured."""
    lines: list[str] = []
    for direction in goal.cell.directions:
        name, least = getattr(goal, direction)
        row = next(row for row in rows if (row.direction, row.variant) == (direction, name))
        verdict = "reached" if row.ratio >= least else "missed"
        lines.append(f"  {verdict}: {name} {direction} {row.ratio:.2f} times as fast as {BASELINE}, wanted {least:g}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sequence-parallel attention on links of a set bandwidth")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="one small cell")
    which.add_argument("--goals", action="store_true", help="the best strategy of each kind of links, beside its goal")
    parser.add_argument("--topology", choices=netns.TOPOLOGIES, help="only cells on these links")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--mbit", type=float, default=20.0, help="Mbit/s of every link, each way")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each variant")
    parser.add_argument(
        "--bucket", action="store_true", help="a token bucket in the channel, also where root is at hand"
    )
    options = parser.parse_args()
    reason = netns.available()
    if options.goals and (reason or options.bucket):
        parser.exit(3, f"the goals compare with {BASELINE}, which needs shaped links: {reason or 'leave --bucket'}\n")
    if reason and not options.bucket:
        print(f"no network namespaces ({reason}): a token bucket in the channel keeps the links, peers are left out")
    if importlib.util.find_spec("ring_attention_pytorch") is None:
        print(peers.INSTALL)
    rows: list[Row] = []
    goals = {goal.cell: goal for goal in GOALS if options.goals}
    for cell in goals or (QUICK if options.quick else FULL):
        if options.topology in (None, cell.topology):
            peer_count = 1 if cell in goals else 3
            found = measure(cell, options.mbit, options.rounds, peer_count, options.bucket or bool(reason))
            show(found)
            rows += found
            if cell in goals:
                print(judge(goals[cell], found))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()

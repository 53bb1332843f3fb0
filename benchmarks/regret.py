"""How good the planner's choice is: measured on shaped links against every strategy, and its predictions with it.

    python -m benchmarks.regret [--quick] [--json FILE] [--rounds N] [--seconds N]

On each network (:mod:`benchmarks.netns`, needs root) the planner's own probe measures links and a block; then every
strategy runs, forward and backward, on every problem. Printed for each cell: the choice, what it took beside the best,
what was predicted. At the end: regret, the gain over the best single strategy used everywhere, and the error of the
predictions. The full run has 72 cells: three topologies; links slow and fast beside the cores; groups of 1, 4 and 8
query heads to a key head and queries as many as keys, a quarter or a sixteenth on 4 ranks; three such problems on 8.

With ``--json`` a run goes on where an earlier one with the same file ended, network by network; with ``--seconds`` it
begins no network after that time.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import netns, peers
from benchmarks.links import Cell, ours
from benchmarks.table import alternate
from data.files import write_atomic
from fused.mask import FULL
from parallel.attention import attend
from parallel.plan.choose import Plan, plan
from parallel.plan.probe import measure_blocks, measure_links
from parallel.plan.replay import Machines
from parallel.plan.topology import Topology
from parallel.strategies import find_strategy
from tests.helpers.dist import run_distributed

SLOW, FAST = 20.0, 1000.0  # Mbit/s: below and above what two cores compute and copy at
KEYS = 512


@dataclass(frozen=True)
class Found:
    """One direction of one cell."""

    network: str
    cell: str
    mbit: float
    direction: str
    chosen: str
    best: str
    measured: dict[str, float]  # seconds by strategy
    predicted: dict[str, float]

    @property
    def regret(self) -> float:
        return self.measured[self.chosen] / self.measured[self.best] - 1


def problems(topology: str, ranks: int) -> list[Cell]:
    """Grouping by share of queries."""
    some = product((1, 4, 8), (1, 4, 16)) if ranks <= 4 else ((1, 1), (4, 1), (4, 8))
    return [
        Cell(topology, ranks, KEYS // share, KEYS, heads=8, kv_heads=8 // group, head_dim=32) for group, share in some
    ]


def networks(quick: bool) -> list[tuple[str, int, float]]:
    if quick:
        return [("ring", 4, SLOW)]
    return list(product(netns.TOPOLOGIES, (4, 8), (SLOW, FAST)))


def network_name(topology: str, ranks: int, mbit: float) -> str:
    return f"{topology} {ranks} {mbit:g}"


def _calls(cell: Cell, rank: int) -> dict[str, peers.Variant]:
    generator = torch.Generator().manual_seed(rank)
    shapes = [(cell.queries, cell.heads), (cell.keys, cell.kv_heads), (cell.keys, cell.kv_heads)]
    q, k, v = (torch.randn(1, n // cell.ranks, h, cell.head_dim, generator=generator) for n, h in shapes)
    layout, key_layout = cell.layouts
    variants: dict[str, peers.Variant] = {}
    for name in ours(cell):

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str = name) -> torch.Tensor:
            places: dict[str, Any] = {"layout": layout, "key_layout": key_layout}
            return attend(q, k, v, group=dist.group.WORLD, strategy=name, mask=FULL, timeout=120.0, **places)

        variants[name] = peers.autograd(call, q, k, v, torch.ones_like(q))
        variants[name].forward()
    return variants


Measured = dict[str, dict[str, list[float]]]  # seconds of the rounds by direction and strategy


def _rank(
    rank: int, world_size: int, cells: list[Cell], rounds: int
) -> tuple[Topology, list[Machines], list[Measured]]:
    """The links, and for each cell the speed of a block and the times of all strategies."""
    group, device = dist.group.WORLD, torch.device("cpu")
    assert group is not None
    kind: Any = cells[0].topology
    links = measure_links(group, device, kind)
    machines: list[Machines] = []
    measured: list[Measured] = []
    for cell in cells:
        sizes = (cell.heads, cell.kv_heads, cell.head_dim)
        machines.append(measure_blocks(cell.keys // cell.ranks, sizes, torch.float32, device, group))
        variants = _calls(cell, rank)
        measured.append({})
        for direction in cell.directions:
            calls = {name: getattr(variant, direction) for name, variant in variants.items()}
            times = alternate(calls, rounds, before=dist.barrier)
            measured[-1][direction] = {name: times[name].wall for name in calls}
    return links, machines, measured


def _judge(cell: Cell, mbit: float, chosen: Plan, by_rank: list[Measured]) -> list[Found]:
    found: list[Found] = []
    for direction in ("forward", "backward"):
        ranks = [measured[direction] for measured in by_rank]
        slowest = {n: [max(r) for r in zip(*(rank[n] for rank in ranks), strict=True)] for n in ranks[0]}
        seconds = {name: statistics.median(rounds) for name, rounds in slowest.items()}
        predicted = {c.strategy: c.prediction.seconds for c in chosen.of(direction) if c.prediction is not None}
        best = min(seconds, key=lambda name: seconds[name])
        found.append(
            Found(
                network_name(cell.topology, cell.ranks, mbit),
                str(cell),
                mbit,
                direction,
                getattr(chosen, direction),
                best,
                seconds,
                predicted,
            )
        )
    return found


def measure(topology: str, ranks: int, mbit: float, rounds: int, cells: list[Cell]) -> list[Found]:
    """Some problems on one network."""
    with netns.Network(topology, ranks, mbit) as network:
        by_rank = run_distributed(_rank, ranks, cells, rounds, timeout=3600, prepare=network.seat)
    links, machines, _ = by_rank[0]
    found: list[Found] = []
    for index, cell in enumerate(cells):
        strategies = [find_strategy(name) for name in ours(cell)]
        chosen = plan(strategies, cell.problem, cell.widths, links, machines[index])
        found += _judge(cell, mbit, chosen, [measured[index] for _, _, measured in by_rank])
    return found


def show(found: list[Found]) -> None:
    for one in found:
        errors = [one.predicted[name] / one.measured[name] - 1 for name in one.predicted]
        print(
            f"{one.cell}, {one.mbit:g} Mbit, {one.direction}: {one.chosen} {1e3 * one.measured[one.chosen]:.0f} ms, "
            f"best {one.best} {1e3 * one.measured[one.best]:.0f} ms, regret {one.regret:.0%}; "
            f"predictions off by {statistics.median(map(abs, errors)):.0%} in the median",
            flush=True,
        )


def summarise(found: list[Found]) -> str:
    """Regret, gain over one strategy everywhere, error of predictions."""
    names = set.intersection(*(set(one.measured) for one in found))

    def gain(name: str) -> float:
        logs = [math.log(one.measured[name] / one.measured[one.chosen]) for one in found]
        return math.exp(statistics.fmean(logs))

    fixed = min(names, key=gain)
    errors = sorted(abs(one.predicted[n] / one.measured[n] - 1) for one in found for n in one.predicted)
    regrets = sorted(one.regret for one in found)
    close = sum(error <= 0.15 for error in errors) / len(errors)
    return (
        f"{len(found) // 2} cells, both directions: regret mean {statistics.fmean(regrets):.1%}, median "
        f"{statistics.median(regrets):.1%}, largest {regrets[-1]:.0%}; {gain(fixed):.2f}x faster than the best single "
        f"strategy, {fixed} (geometric mean); predictions off by {statistics.median(errors):.0%} in the median, "
        f"{close:.0%} of them within 15%"
    )


def check_model(rounds: int = 2) -> None:
    """Predictions beside measurements between 2, 4 and 8 ranks, for :mod:`benchmarks.simulate`."""
    everything: list[Found] = []
    print(f"shaped links of {SLOW:g} Mbit/s, seconds measured / predicted")
    for topology, ranks in product(netns.TOPOLOGIES, (2, 4, 8)):
        found = measure(topology, ranks, SLOW, rounds, problems(topology, ranks)[:1])
        everything += found
        for one in found:
            pairs = (f"{n} {one.measured[n]:.2f} / {p:.2f}" for n, p in one.predicted.items())
            print(f"{topology}, {ranks} ranks, {one.direction}: {'; '.join(pairs)}", flush=True)
    print(summarise(everything), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Regret and prediction error of the planner on shaped links")
    parser.add_argument("--quick", action="store_true", help="one network")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep all times in FILE, and go on from what it has")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of each strategy")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no network after this time")
    options = parser.parse_args()
    if reason := netns.available():
        parser.exit(3, f"shaped links cannot be made here: {reason}\n")
    found: list[Found] = []
    if options.json is not None and options.json.exists():
        found = [Found(**one) for one in json.loads(options.json.read_text())]
    show(found)
    known, started = {one.network for one in found}, time.monotonic()
    for topology, ranks, mbit in networks(options.quick):
        if network_name(topology, ranks, mbit) in known or time.monotonic() - started > options.seconds:
            continue
        some = measure(topology, ranks, mbit, options.rounds, problems(topology, ranks))
        show(some)
        found += some
        if options.json is not None:
            write_atomic(options.json, json.dumps([asdict(one) for one in found], indent=1) + "\n")
    print(summarise(found))


if __name__ == "__main__":
    main()

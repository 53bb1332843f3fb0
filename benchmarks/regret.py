"""How good the planner's choice is: measured on shaped links against every strategy, and its predictions with it.

    python -m benchmarks.regret [--quick] [--json FILE] [--rounds N] [--seconds N]

On each network (:mod:`benchmarks.netns`, needs root) the planner's own probe measures links and a block; then every
strategy runs, forward and backward, on every problem. Printed for each cell: the choice, what it took beside the best,
what was predicted. At the end: regret, the gain over the best single strategy used everywhere, and the error of the
predictions. The full run has 72 cells: three topologies; links slow and fast beside the cores, with longer sequences
where they are fast (else a cell takes less time than the system needs to wake a process); groups of 1, 4 and 8 query
heads to a key head and queries as many as keys, a quarter or a sixteenth on 4 ranks; three such problems on 8.

With ``--json`` a run goes on where an earlier one with the same file ended, network by network; with ``--seconds`` it
begins no network after that time. The file has what was measured, the probe's figures among it; plans are made from
these anew each time.
"""

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
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
from parallel.plan.choose import DIRECTIONS, plan
from parallel.plan.probe import measure_blocks, measure_links
from parallel.plan.replay import Machine, Machines
from parallel.plan.topology import Speed, Topology
from parallel.strategies import find_strategy
from tests.helpers.dist import run_distributed

SLOW, FAST = 20.0, 1000.0  # Mbit/s: below and above what two cores compute and copy at
KEYS = {SLOW: 512, FAST: 2048}
SPAN, MOST = 3.0, 12  # seconds that a cell's direction is measured for at least, unless that takes more rounds


Seconds = dict[str, float]  # by strategy


@dataclass(frozen=True)
class Measured:
    """One problem on one network: what the probe found, and what the strategies took."""

    topology: str
    ranks: int
    mbit: float
    problem: int  # its number among :func:`problems`
    links: Topology
    machines: Machines
    seconds: dict[str, Seconds]  # by direction

    @classmethod
    def load(cls, fields: dict[str, Any]) -> "Measured":
        links = dict(fields["links"])
        links["speed"] = Speed(*links["speed"])
        machines = {direction: Machine(**machine) for direction, machine in fields["machines"].items()}
        return cls(**{**fields, "links": Topology(**links), "machines": machines})


@dataclass(frozen=True)
class Found:
    """One direction of one cell."""

    cell: str
    mbit: float
    direction: str
    chosen: str
    best: str
    measured: Seconds
    predicted: Seconds

    @property
    def regret(self) -> float:
        return self.measured[self.chosen] / self.measured[self.best] - 1


def problems(topology: str, ranks: int, mbit: float) -> list[Cell]:
    """Grouping by share of queries."""
    some = product((1, 4, 8), (1, 4, 16)) if ranks <= 4 else ((1, 1), (4, 1), (4, 8))
    keys = KEYS[mbit]
    return [
        Cell(topology, ranks, keys // share, keys, heads=8, kv_heads=8 // group, head_dim=32) for group, share in some
    ]


def networks(quick: bool) -> list[tuple[str, int, float]]:
    if quick:
        return [("ring", 4, SLOW)]
    return list(product(netns.TOPOLOGIES, (4, 8), (SLOW, FAST)))


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


Rounds = dict[str, dict[str, list[float]]]  # seconds by direction and strategy


def _rank(rank: int, world_size: int, cells: list[Cell], rounds: int) -> tuple[Topology, list[Machines], list[Rounds]]:
    """The links, and for each cell the speed of a block and the times of all strategies."""
    group, device = dist.group.WORLD, torch.device("cpu")
    assert group is not None
    kind: Any = cells[0].topology
    links = measure_links(group, device, kind)
    machines: list[Machines] = []
    measured: list[Rounds] = []
    for cell in cells:
        sizes = (cell.heads, cell.kv_heads, cell.head_dim)
        machines.append(measure_blocks(cell.keys // cell.ranks, sizes, torch.float32, device, group))
        variants = _calls(cell, rank)
        measured.append({})
        for direction in cell.directions:
            calls = {name: getattr(variant, direction) for name, variant in variants.items()}
            measured[-1][direction] = _times(calls, rounds)
    return links, machines, measured


def _times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of all rounds; equally many on all ranks, and more than ``rounds`` where these are soon over."""
    times = alternate(calls, rounds, before=dist.barrier)
    spent = torch.tensor(sum(sum(times[name].wall) for name in calls) / rounds)
    dist.all_reduce(spent, dist.ReduceOp.MAX)
    more = min(math.ceil(SPAN / float(spent)), MOST) - rounds
    later = alternate(calls, more, before=dist.barrier) if more > 0 else {}
    return {name: times[name].wall + (later[name].wall if later else []) for name in calls}


def _slowest(by_rank: list[dict[str, list[float]]]) -> Seconds:
    """Of each strategy the median round, by the slowest rank."""
    return {n: statistics.median(map(max, zip(*(rank[n] for rank in by_rank), strict=True))) for n in by_rank[0]}


def measure(topology: str, ranks: int, mbit: float, rounds: int, cells: list[Cell]) -> list[Measured]:
    """Some problems on one network."""
    with netns.Network(topology, ranks, mbit) as network:
        by_rank = run_distributed(_rank, ranks, cells, rounds, timeout=3600, prepare=network.seat)
    links, machines, _ = by_rank[0]
    return [
        Measured(
            *(topology, ranks, mbit, index, links, machines[index]),
            {direction: _slowest([rounds[index][direction] for _, _, rounds in by_rank]) for direction in DIRECTIONS},
        )
        for index in range(len(cells))
    ]


def judge(measured: Measured) -> list[Found]:
    """The planner's choice and predictions beside what was measured."""
    cell = problems(measured.topology, measured.ranks, measured.mbit)[measured.problem]
    strategies = [find_strategy(name) for name in ours(cell)]
    chosen = plan(strategies, cell.problem, cell.widths, measured.links, measured.machines)
    found: list[Found] = []
    for direction in DIRECTIONS:
        seconds = measured.seconds[direction]
        predicted = {c.strategy: c.prediction.seconds for c in chosen.of(direction) if c.prediction is not None}
        best = min(seconds, key=lambda name: seconds[name])
        ours_is = getattr(chosen, direction)
        found.append(Found(str(cell), measured.mbit, direction, ours_is, best, seconds, predicted))
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
        found = judge(measure(topology, ranks, SLOW, rounds, problems(topology, ranks, SLOW)[:1])[0])
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
    measured: list[Measured] = []
    if options.json is not None and options.json.exists():
        measured = [Measured.load(fields) for fields in json.loads(options.json.read_text())]
    found = [one for some in measured for one in judge(some)]
    show(found)
    known, started = {(one.topology, one.ranks, one.mbit) for one in measured}, time.monotonic()
    for network in networks(options.quick):
        if network in known or time.monotonic() - started > options.seconds:
            continue
        new = measure(*network, options.rounds, problems(*network))
        judged = [one for some in new for one in judge(some)]
        show(judged)
        measured, found = measured + new, found + judged
        if options.json is not None:
            write_atomic(options.json, json.dumps([asdict(one) for one in measured], indent=1) + "\n")
    print(summarise(found))


if __name__ == "__main__":
    main()

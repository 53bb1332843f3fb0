"""Sequence-parallel attention at sizes that are not at hand: schedules replayed on models of links.

    python -m benchmarks.simulate [--ranks N ...] [--heads SHAPE] [--strategies NAME ...]
        [--plot FILE] [--json FILE] [--check]

Every strategy's schedule is replayed (:mod:`parallel.plan.replay`) for islands of eight GPUs whose ports to a switch
are faster than each GPU's port to the fabric between islands. The figures of the machine are inputs, stated in the
output; nothing here was measured on one. ``--check`` measures what can be measured in the same run: shaped links
between 2, 4 and 8 ranks of this machine (:mod:`benchmarks.links`, needs root) beside the same model's predictions.
"""

import argparse
import gc
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from parallel.layout import Run
from parallel.plan.cost import predict, weigh
from parallel.plan.replay import Machine
from parallel.plan.topology import Speed, Topology
from parallel.ring import hybrid, ring, tile, ulysses
from parallel.ring.problem import Heads, Need, Problem, Segments
from parallel.ring.schedule import Direction, Schedule
from parallel.ring.traffic import Widths
from parallel.strategies import BUILDS

ISLAND = 8
SWITCH = Speed(400e9, 5e-6)  # bytes/s each way of a GPU's port to the switch of its island; seconds a message
FABRIC = Speed(50e9, 10e-6)  # of its port to the fabric: 400 Gbit/s
GPU = Machine(flops=500e12, block=10e-6)  # FLOP/s of block attention, and seconds of a kernel's start
CONTEXT = 1 << 18  # tokens, all of which see each other: causal work would be half as much, evenly spread
UNITS = 2  # tokens that stand for a rank's shard
ALL_RANKS = 64  # with more, only strategies whose schedules are written down within minutes

Build = Callable[[Problem, Direction], Schedule]


class Dense(Problem):
    """A problem in which everything sees everything: its needs are no question."""

    def need(
        self, queries: int, keys: int, query_segments: Segments | None = None, key_segments: Segments | None = None
    ) -> Need:
        return Need(
            self.whole("query", queries) if query_segments is None else query_segments,
            self.whole("keys", keys) if key_segments is None else key_segments,
        )


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int = 128


SHAPES = {"32:32": Shape(32, 32), "64:8": Shape(64, 8)}


def builds(ranks: int, shape: Shape) -> dict[str, Build]:
    """Strategies worth a look: the plain ones, tiles, and head splits inside an island."""
    found: dict[str, Build] = {"ring": ring.build}
    if ranks <= ALL_RANKS:
        names = ("bidirectional_ring", "token_ring", "bidirectional_query", "allgather", "allgather_query")
        found |= {name: BUILDS[name] for name in names}
    rows = (2, 4, 8, 16, 32) if ranks <= ALL_RANKS else (ISLAND, 32)
    found |= {f"tile:{row}": partial(tile.build, row=row) for row in rows if ranks % row == 0 and row < ranks}
    if ranks <= shape.kv_heads:
        found["ulysses"] = ulysses.build
    group = min(ISLAND, shape.kv_heads)
    if group < ranks <= ALL_RANKS:
        inner: dict[str, Build] = {"ring": ring.build, "tile": tile.build}
        found |= {f"hybrid:{group}:{n}": partial(hybrid.build, inner=i, group=group) for n, i in inner.items()}
    return found


@dataclass(frozen=True)
class Row:
    shape: str
    ranks: int
    strategy: str
    direction: str
    ms: float
    compute_ms: float
    exposed_ms: float
    fabric_gb: float  # on the busiest port of the fabric
    held_gb: float


def dense_problem(ranks: int, shape: Shape) -> Problem:
    """What :func:`parallel.ring.problem.make_problem` makes of shards of :data:`UNITS` tokens under a full mask."""
    parts = tuple(tuple(Run(t, t + 1) for t in range(UNITS * rank, UNITS * (rank + 1))) for rank in range(ranks))
    pairs = np.ones((UNITS * ranks, UNITS * ranks), np.int64)
    return Dense(parts, parts, pairs, Heads(0, shape.heads), shape.heads // shape.kv_heads)


def simulate(label: str, shape: Shape, ranks: int, only: list[str] | None = None) -> list[Row]:
    """Full attention over :data:`CONTEXT` tokens in bf16; with ``only`` these of the strategies."""
    problem, widths = dense_problem(ranks, shape), Widths(1, shape.head_dim, shape.head_dim, 2)
    topology = Topology("two_level", ranks, SWITCH, min(ISLAND, ranks), FABRIC)
    rows: list[Row] = []
    for name, build in builds(ranks, shape).items():
        if only is not None and name not in only:
            continue
        directions: tuple[Direction, Direction] = ("forward", "backward")
        for direction in directions:
            program = weigh(build(problem, direction), widths, CONTEXT / (UNITS * ranks))
            prediction, run = predict(program, topology, GPU)
            rows.append(
                Row(
                    *(label, ranks, name, direction),
                    ms=1e3 * prediction.seconds,
                    compute_ms=1e3 * prediction.compute,
                    exposed_ms=1e3 * prediction.exposed,
                    fabric_gb=float(run.link_bytes[2 * ranks :].max()) / 1e9,
                    held_gb=prediction.memory / 1e9,
                )
            )
    return rows


def show(rows: list[Row]) -> None:
    for label in dict.fromkeys(row.shape for row in rows):
        for ranks in dict.fromkeys(row.ranks for row in rows if row.shape == label):
            print(f"\nheads {label}, {ranks} ranks, {CONTEXT:,} tokens, full, bf16")
            print(f"  {'':34}{'ms':>10}{'computing':>11}{'exposed':>10}{'fabric GB':>11}{'held GB':>9}")
            some = [row for row in rows if row.shape == label and row.ranks == ranks]
            for row in sorted(some, key=lambda row: (row.direction != "forward", row.ms)):
                print(
                    f"  {row.direction:9} {row.strategy:24}{row.ms:>10.3g}{row.compute_ms:>11.3g}"
                    f"{row.exposed_ms:>10.3g}{row.fabric_gb:>11.3g}{row.held_gb:>9.2g}"
                )


def plot(rows: list[Row], file: Path) -> None:
    """Forward and backward together over the number of ranks, beside the time of computing alone."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    labels = list(dict.fromkeys(row.shape for row in rows))
    for axes, label in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels, strict=True):
        some = [row for row in rows if row.shape == label]
        for family in dict.fromkeys(row.strategy.partition(":")[0] for row in some):
            best: dict[int, float] = {}
            for ranks in sorted({row.ranks for row in some}):
                totals: dict[str, float] = {}
                for row in some:
                    if row.ranks == ranks and row.strategy.partition(":")[0] == family:
                        totals[row.strategy] = totals.get(row.strategy, 0.0) + row.ms
                if totals:
                    best[ranks] = min(totals.values())
            axes.plot(list(best), list(best.values()), marker="o", markersize=4, label=family)
        computing = {row.ranks: 0.0 for row in some}
        for ranks in computing:
            computing[ranks] = sum(
                max(row.compute_ms for row in some if row.ranks == ranks and row.direction == d)
                for d in ("forward", "backward")
            )
        axes.plot(list(computing), list(computing.values()), color="black", linestyle="--", label="computing alone")
        axes.set(xscale="log", yscale="log", xlabel="ranks", ylabel="ms a layer", title=f"heads {label}")
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Replay schedules on models of links")
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[8, 16, 32, 64, 256],
        help="1024 takes ten minutes and 4 GB; one strategy for one shape one minute and a half",
    )
    parser.add_argument("--heads", choices=list(SHAPES), help="query and key heads; default: each in turn")
    parser.add_argument("--strategies", nargs="+", metavar="NAME", help="only these; default: all worth a look")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw them")
    parser.add_argument("--check", action="store_true", help="compare the model with shaped links of 2, 4, 8 ranks")
    options = parser.parse_args()
    if options.check:
        from benchmarks.regret import check_model

        check_model()
    print(
        f"islands of {ISLAND}: {SWITCH.bandwidth / 1e9:.0f} GB/s each way to the switch, {FABRIC.bandwidth / 1e9:.0f} "
        f"GB/s to the fabric, {GPU.flops / 1e12:.0f} TFLOP/s a rank: assumed, not measured"
    )
    gc.disable()  # millions of messages and no cycles among them: looking for some takes a quarter of the time
    rows: list[Row] = []
    for ranks in options.ranks:
        for label, shape in SHAPES.items():
            if options.heads in (None, label):
                found = simulate(label, shape, ranks, options.strategies)
                show(found)
                rows += found
    if options.plot is not None:
        plot(rows, options.plot)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Draws schedules as the cost model replays them: what every rank computes and which messages are under way.

    python -m benchmarks.schedules [--ranks N] [--out docs/images/schedules.svg]

One row a strategy, forward and backward, on links that suit it; messages are lines from sender to receiver. Drawn for
communication that takes about as long as computing, so that both can be seen.
"""

import argparse
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fused.mask import FULL
from parallel.layout import contiguous
from parallel.plan.cost import predict, weigh
from parallel.plan.program import MERGED
from parallel.plan.replay import Machine
from parallel.plan.topology import Kind, Speed, Topology
from parallel.ring.scene import plain_scene
from parallel.ring.traffic import Widths
from parallel.strategies import find_strategy

SHOWN: dict[str, Kind] = {
    "local": "port",
    "ring": "ring",
    "bidirectional_ring": "ring",
    "token_ring": "mesh",
    "bidirectional_query": "ring",
    "tile": "port",
    "ulysses": "port",
    "hybrid": "port",
    "allgather": "mesh",
    "allgather_query": "mesh",
}
BLOCK, INPUT, RESULT = "#2a6fbb", "#2c8a57", "#d9680f"


def draw(axes: Axes, name: str, kind: Kind, direction: str, ranks: int) -> None:
    """One schedule: blocks as bars, inputs and results that travel as lines of two colours."""
    strategy = find_strategy(name)
    ranks = 1 if strategy.single else ranks
    layout = contiguous(64 * ranks, ranks)
    problem = plain_scene(layout, layout, FULL, 8, 8).problem
    schedule = getattr(strategy, direction)(problem)
    program = weigh(schedule, Widths(1, 16, 16, 4))
    block = program.flops.sum() / ranks**2
    keys = 2 * 64 * 8 * 16 * 4.0
    prediction, run = predict(program, Topology(kind, ranks, Speed(keys)), Machine(block / 0.8))
    for step in range(program.steps):
        for rank in range(ranks):
            width = run.computed[step, rank] - run.computing[step, rank]
            if width > 0:
                axes.barh(rank, width, left=run.computing[step, rank], height=0.42, color=BLOCK, edgecolor="white")
    for i in range(len(program.size)):
        color = RESULT if program.point[i] == MERGED else INPUT
        ends = ([run.begin[i], run.arrival[i]], [program.source[i], program.target[i]])
        axes.plot(*ends, color=color, linewidth=0.9, alpha=0.8)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=7)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_xlim(0, None)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    exposed = prediction.exposed / prediction.seconds
    links = "one rank" if strategy.single else f"{kind} links"
    axes.set_title(f"{name}, {direction} ({links}): {exposed:.0%} exposed", fontsize=9, loc="left")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw schedules as the cost model replays them")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("docs/images/schedules.svg"))
    options = parser.parse_args()
    figure = Figure(figsize=(11, 1.6 * len(SHOWN)), layout="constrained")
    grid = figure.subplots(len(SHOWN), 2, squeeze=False)
    for row, (name, kind) in zip(grid, SHOWN.items(), strict=True):
        for axes, direction in zip(row, ("forward", "backward"), strict=True):
            draw(axes, name, kind, direction, options.ranks)
    for axes in grid[-1]:
        axes.set_xlabel("time; 1 is one shard of keys and values on one link", fontsize=8)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    mpl.rcParams |= {
        "svg.fonttype": "none",
        "svg.hashsalt": "schedules",
    }  # small files, the same for the same schedules
    figure.savefig(options.out, metadata={"Date": None} if options.out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()

"""What all benchmarks share: paired timing, the table that they print, and ``--quick`` and ``--json FILE``.

A row compares one figure of ours with one of a peer's, measured in the same run. ``ratio`` is the peer's figure over
ours where less is better (times, bytes) and ours over the peer's where more is better (rates), so that above 1 is
always in our favour.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison."""

    case: str
    metric: str
    ours: float
    peer: float
    peer_name: str
    ratio: float


@dataclass(frozen=True)
class Times:
    """Seconds of each round, in the order of the rounds: elapsed, and CPU time of the process's threads."""

    wall: list[float]
    cpu: list[float]


def compare(case: str, metric: str, ours: float, peer: float, peer_name: str, *, less_is_better: bool = True) -> Row:
    ratio = peer / ours if less_is_better else ours / peer
    return Row(case, metric, ours, peer, peer_name, ratio)


def arguments(description: str, **flags: str) -> argparse.Namespace:
    """Parse ``--quick`` (a smaller run for a smoke test), ``--json FILE``, and more flags with what they do."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    return parser.parse_args()


def alternate(
    variants: Mapping[str, Callable[[], object]], rounds: int, before: Callable[[], object] = lambda: None
) -> dict[str, Times]:
    """Time all variants once a round, after one round that does not count.

    The order turns around every round, so that drift of the machine and what one variant leaves in the caches meet all
    alike. ``before`` runs untimed before each call, for instance a barrier.
    """
    times = {name: Times([], []) for name in variants}
    for index in range(rounds + 1):
        names = list(variants) if index % 2 else list(variants)[::-1]
        for name in names:
            before()
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if index > 0:
                times[name].wall.append(wall)
                times[name].cpu.append(cpu)
    return times


def median_ratio(ours: Sequence[float], peer: Sequence[float]) -> float:
    """The median of the rounds' own ratios ``peer / ours``: both halves of a pair saw the same machine."""
    return statistics.median(p / o for o, p in zip(ours, peer, strict=True))


def paired(case: str, metric: str, ours: Sequence[float], peer: Sequence[float], peer_name: str) -> Row:
    """Compare two lists of times by round: medians in milliseconds, and the median ratio of the pairs."""
    figures = [1000 * statistics.median(values) for values in (ours, peer)]
    return Row(case, metric, figures[0], figures[1], peer_name, median_ratio(ours, peer))


def report(rows: Sequence[Row], file: Path | None, title: str, notes: Sequence[str] = ()) -> None:
    """Print the table; write the rows as JSON if a file is given."""
    cells = [("case", "metric", "ours", "peer", "ratio", "peer is")]
    cells += [(r.case, r.metric, f"{r.ours:.4g}", f"{r.peer:.4g}", f"{r.ratio:.2f}", r.peer_name) for r in rows]
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(cells[0]))]
    print(f"\n{title}\nratio above 1: ours is better")
    for index, line in enumerate(cells):
        text = [f"{c:>{w}}" if 2 <= i <= 4 else f"{c:<{w}}" for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        print("  ".join(text).rstrip())
        if index == 0:
            print("  ".join("-" * width for width in widths))
    for note in notes:
        print(note)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
        print(f"wrote {file}")

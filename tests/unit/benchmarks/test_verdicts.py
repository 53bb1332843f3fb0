"""What the benchmarks on shaped links conclude from times, on times that are made up here."""

import json
from dataclasses import asdict

import pytest

from benchmarks.links import Cell, Goal, Row, judge, ours
from benchmarks.overlap import STRATEGIES, busiest_seconds, cell_of
from benchmarks.regret import DIRECTIONS, SLOW, Found, Measured, problems, summarise
from benchmarks.regret import judge as judge_plan
from parallel.plan.replay import Machine
from parallel.plan.topology import Speed, Topology


def test_a_goal_is_reached_or_missed():
    cell = Cell("mesh", 4, 8, 8, 2, 2, 4)

    def row(direction: str, name: str, ratio: float) -> Row:
        return Row(str(cell), "mesh", direction, name, 1.0, ratio, 1.0, 0.0, None)

    rows = [row("forward", "tile:2", 1.5), row("forward", "ring", 9.0), row("backward", "tile:2", 1.9)]
    first, second = judge(Goal(cell, ("tile:2", 1.5), ("tile:2", 2.0)), rows).splitlines()
    assert "reached: tile:2 forward 1.50" in first
    assert "missed: tile:2 backward 1.90" in second


def test_regret_gain_and_errors():
    def found(chosen: str, ring: float, tile: float, predicted: dict[str, float]) -> Found:
        best = "ring" if ring < tile else "tile"
        return Found("c", 20.0, "forward", chosen, best, {"ring": ring, "tile": tile}, predicted)

    both = [
        found("tile", 2.0, 1.0, {"ring": 2.0, "tile": 1.1}),
        found("tile", 1.0, 1.1, {"ring": 1.5, "tile": 1.1}),
    ]
    assert [one.regret for one in both] == pytest.approx([0.0, 0.1])
    text = summarise(both)
    assert text.startswith("1 cells, both directions: regret mean 5.0%, median 5.0%, largest 10%")
    assert "1.00x faster than the best single strategy, tile" in text
    assert "off by 5% in the median, 75% of them within 15%" in text


def test_plans_are_made_anew_from_what_was_measured():
    machine = Machine(1e9, 1e-3, 1e-3)
    links = Topology("ring", 4, Speed(1e6, 1e-3), injection=1.5e6)
    seconds = {direction: dict.fromkeys(ours(problems("ring", 4, SLOW)[1]), 1.0) for direction in DIRECTIONS}
    measured = Measured("ring", 4, 20.0, 1, links, dict.fromkeys(DIRECTIONS, machine), seconds)
    loaded = Measured.load(json.loads(json.dumps(asdict(measured))))
    assert loaded == measured
    forward, backward = judge_plan(loaded)
    assert forward.cell == str(problems("ring", 4, SLOW)[1])
    assert set(backward.predicted) == set(backward.measured)
    assert forward.predicted[forward.chosen] <= 1.02 * min(forward.predicted.values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_busiest_link_is_that_of_the_formulas(name):
    """Four ranks: three shards of keys and values, or of queries; half of them each way where both ways are used."""
    query = 64 * 8 * 128 * 4
    out = query + 64 * 8 * 4
    shards = {
        "ring": 6 * query,
        "bidirectional_ring": 3 * query,
        "bidirectional_query": 1.5 * (query + out),
        "token_ring": 3 * query + out,
    }
    assert busiest_seconds(name, "forward", cell_of(name, 4), 8.0) == pytest.approx(shards[name] / 1e6)

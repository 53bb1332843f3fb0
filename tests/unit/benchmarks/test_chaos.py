"""What the benchmarks of faults conclude from a run's records, and that their plan outlives a call."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import chaos, elastic
from benchmarks.elastic import RESUMED
from benchmarks.submitted import Run
from trainers.journal import METRICS_FILE


def run_of(folder: Path, name: str, losses: list[tuple[int, float]]) -> Run:
    nodes: Any = None
    run = Run(name, folder, nodes, [])
    run.run_dir.mkdir(parents=True)
    lines = [json.dumps({"step": step, "train/loss": loss}) + "\n" for step, loss in losses]
    (run.run_dir / METRICS_FILE).write_text("".join(lines))
    return run


def test_losses_are_compared_to_the_last_bit(tmp_path: Path):
    expected = run_of(tmp_path, "expected", [(1, 0.5), (2, 0.25), (3, 0.125)])
    assert chaos.compare(run_of(tmp_path, "equal", [(1, 0.5), (2, 0.25)]), expected) == ""
    other = run_of(tmp_path, "other", [(1, 0.5), (2, 0.25 * (1 + 2**-52))])
    assert chaos.compare(other, expected) == "1 losses differ, the first after step 2"
    for name, steps in (("twice", [1, 2, 2]), ("missing", [1, 3]), ("late", [2, 3])):
        found = chaos.compare(run_of(tmp_path, name, [(step, 0.5) for step in steps]), expected)
        assert found == "steps are missing or there twice", name


def test_a_plan_is_drawn_once(tmp_path: Path):
    options = argparse.Namespace(rounds=12, seed=3, plain=True)
    plan = chaos.plan_of(tmp_path, options)
    assert len(plan) == 12
    assert set(plan) == set(chaos.ANYWHERE)
    assert chaos.plan_of(tmp_path, options) == plan
    with pytest.raises(SystemExit, match="of 12 rounds with seed 3"):
        chaos.plan_of(tmp_path, argparse.Namespace(rounds=12, seed=4, plain=True))


def test_an_elastic_run_is_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    losses = [(step, 1 / step) for step in range(1, 5)]
    run, same = run_of(tmp_path, "elastic", losses), dict(losses)
    plan = [(2, 0), (1, 2), (2, 3)]
    assert elastic.problems(run, plan, same, {step: loss * (1 + 1e-7) for step, loss in losses}) == []
    assert elastic.problems(run, plan[:2], same, same) == ["ranks of the gangs were [2, 1]"]
    wrong = elastic.problems(run, plan, same | {3: 0.0}, {step: loss * 1.01 for step, loss in losses})
    assert wrong == [
        "1 losses differ from the expectation, the first after step 3",
        "that is more than rounding, 0.0001",
    ]
    assert capsys.readouterr().out.count("4 steps; from a run of 2 ranks throughout") == 3


def test_where_a_gang_went_on_is_read_from_its_log():
    log = "2 dp x 1 cp ranks, sharding=ddp, from step 0\nother\n1 dp x 1 cp ranks, resuming after step 20\n"
    assert RESUMED.findall(log) == ["", "20"]

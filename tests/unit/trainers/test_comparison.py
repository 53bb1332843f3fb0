"""The page of a sweep: what each value came to, and which jobs did not come to their end."""

import json
from pathlib import Path

import pytest

from conf.errors import ConfigError
from data.files import canonical_json, write_atomic
from launch.report import main as report
from trainers.comparison import curves, results, write_comparison
from trainers.report import read_run


def write_run(folder: Path, rate: float, seed: int) -> Path:
    records = [{"step": step, "train/loss": 2.0, "eval/loss": rate + step} for step in (1, 2)]
    write_atomic(folder / "metrics.jsonl", "".join(canonical_json(record) + "\n" for record in records))
    config = {"trainer": {"lr": rate}, "model": {"norm": f"kind {seed}"}, "seed": seed}
    write_atomic(folder / "config.yaml", canonical_json(config))
    return folder


def test_a_sweep_has_a_picture_of_every_number_and_a_table_of_what_failed(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"lr={rate}", rate, seed) for seed, rate in enumerate((0.001, 0.1))]
    jobs = [
        {"label": "lr=0.001", "state": "done", "step": 2, "steps": 2, "message": ""},
        {"label": "lr=5", "state": "failed", "step": 1, "steps": 2, "message": "data error: <nowhere>"},
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    text = write_comparison(runs, tmp_path).read_text()
    assert "Not done" in text
    assert "data error: &lt;nowhere&gt;" in text
    pictures = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert "by trainer.lr.png" in pictures
    assert not {"by seed.png", "by model.norm.png"} & pictures
    assert "Not done" not in write_comparison(runs, tmp_path / "elsewhere").read_text()


def test_sweeps_are_compared_by_their_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, rate in (("one", 0.001), ("two", 0.1)):
        write_run(tmp_path / "runs" / name / f"lr={rate}", rate, 0)
        (tmp_path / "runs" / name / "sweep.json").write_text('{"jobs": []}')
    assert report("report", ["one", "two"]) == 0
    text = (tmp_path / "runs" / "comparison" / "report" / "index.html").read_text()
    assert "lr=0.001" in text
    assert "lr=0.1" in text
    (tmp_path / "runs" / "none").mkdir()
    (tmp_path / "runs" / "none" / "sweep.json").write_text('{"jobs": []}')
    with pytest.raises(ConfigError, match="has done a step"):
        report("report", ["none"])


def test_results_are_drawn_over_numbers_that_differ() -> None:
    assert results([(1.0, 2.0), (1.0, 3.0)], "key") is None
    for pairs, scale in (([(0.1, 2.0), (10.0, 1.0)], "log"), ([(0.0, 2.0), (10.0, 1.0)], "linear")):
        figure = results(pairs, "key")
        assert figure is not None
        assert figure.axes[0].get_xscale() == scale


def test_runs_that_differ_in_too_much_have_no_picture_by_key(tmp_path: Path) -> None:
    runs = []
    for number, rate in enumerate((0.001, 0.01, 0.1)):
        folder = write_run(tmp_path / f"run{number}", rate, 0)
        trainer = {"lr": rate, "steps": 2 + number, "batch": 8 + number, "log_every": number, "eval_every": number}
        write_atomic(folder / "config.yaml", canonical_json({"trainer": trainer}))
        runs.append(folder)
    text = write_comparison(runs, tmp_path / "all").read_text()
    assert not list((tmp_path / "all" / "report").glob("by *.png"))
    assert "trainer.steps" in text
    assert "log_every" not in text, "how often a run is looked at is no difference"


def test_many_names_stand_below_the_curves(tmp_path: Path) -> None:
    for count, inside in ((3, True), (4, False)):
        runs = [read_run(write_run(tmp_path / f"{count}-{n}", 0.1 * n, n)) for n in range(count)]
        figure = curves(runs, "train/loss", "Training loss")
        assert figure is not None
        assert (figure.axes[0].get_legend() is not None) == inside
        assert len(figure.legends) == (not inside)


def test_whole_numbers_have_whole_ticks() -> None:
    figure = results([(1.0, 2.0), (2.0, 1.0)], "cluster.ranks")
    assert figure is not None
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())

import json
from pathlib import Path

from trainers.journal import Journal, read_journal


def _write(path: Path, resume_step: int, steps: range) -> None:
    journal = Journal(path, resume_step)
    for step in steps:
        journal.write(step, {"train/loss": 1.0 / step})
    journal.sync()
    journal.close()


def test_records_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    _write(path, 0, range(1, 4))
    assert [(r["step"], r["train/loss"]) for r in read_journal(path)] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]


def test_resume_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 0, range(1, 8))
    with path.open("a") as file:
        file.write('{"step": 8, "train/lo')
    assert [record["step"] for record in read_journal(path)] == list(range(1, 8))
    _write(path, 5, range(6, 9))
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl"], "the file beside is gone"


def test_a_run_that_starts_again_from_zero_has_no_old_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _write(path, 0, range(1, 5))
    _write(path, 0, range(1, 3))
    assert [record["step"] for record in read_journal(path)] == [1, 2]


def test_a_line_is_readable_as_soon_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, 0)
    journal.write(1, {"train/loss": 2.0})
    assert read_journal(path)[0]["train/loss"] == 2.0
    journal.close()


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    journal = Journal(path, 0)
    journal.write(1, {"eval/loss": float("nan"), "train/loss": float("inf"), "optim/lr": 0.1})
    journal.close()
    record = read_journal(path)[0]
    assert (record["eval/loss"], record["train/loss"], record["optim/lr"]) == (None, None, 0.1)


def test_missing_file_has_no_records(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none.jsonl") == []

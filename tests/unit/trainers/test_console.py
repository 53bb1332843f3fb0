import pytest

from trainers import console


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (950, "950"), (11_900, "11.9k"), (999_600, "1.00M"), (1_240_000_000, "1.24B"), (2e13, "20.0T")],
)
def test_short_number(value: float, text: str) -> None:
    assert console.short_number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (856, "14m16s"), (51360, "14h16m"), (-3, "0s")]
)
def test_duration(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


@pytest.mark.parametrize(("value", "text"), [(3e-4, "3e-4"), (2.1e-4, "2.1e-4"), (1.0, "1e0"), (0.0, "0")])
def test_rate(value: float, text: str) -> None:
    assert console.rate(value) == text


def test_step_line_has_every_column_it_was_given() -> None:
    event = {
        "kind": "metrics",
        "step": 120,
        "steps": 4768,
        "train/loss": 2.9141,
        "optim/grad_norm": 0.8249,
        "optim/lr": 2.1e-4,
        "throughput/tokens_per_sec": 11_900.0,
        "memory/peak_gb": 0.9,
        "eta_sec": 856.0,
    }
    expected = "step 120/4768  loss 2.914  gnorm 0.82  lr 2.1e-4  11.9k tok/s  mem 0.9G  eta 14m16s"
    assert console.event_lines(event) == [expected]
    assert console.step_line({"step": 3, "eval/loss": 1.5}) == "step 3  eval 1.500"


def test_other_events() -> None:
    assert console.event_lines({"kind": "log", "message": "hello"}) == ["hello"]
    assert console.event_lines({"kind": "checkpoint", "step": 7, "path": "/x"}) == ["checkpoint  step 7  /x"]
    rows = [{"prompt": "a\nb", "continuation": "c"}, {"prompt": "d", "continuation": "e"}]
    assert console.event_lines({"kind": "samples", "step": 1, "rows": rows}) == [r"sample  'a\nb' -> 'c'"]
    assert console.event_lines({"kind": "unknown"}) == []


def test_show_prints(capsys: pytest.CaptureFixture[str]) -> None:
    console.show({"kind": "log", "message": "hello"})
    assert capsys.readouterr().out == "hello\n"

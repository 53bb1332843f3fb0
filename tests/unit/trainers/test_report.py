import json
import math
import os
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conf.errors import DataError
from trainers import plots
from trainers.plots import smooth
from trainers.report import write_report


def _record(step: int, evaluated: bool) -> dict[str, Any]:
    record = {
        "step": step,
        "time": 0.0,
        "train/loss": 4.0 + 4.0 * math.exp(-step / 60),
        "train/tokens": 4096.0 * step,
        "optim/lr": 1e-3,
        "optim/grad_norm": 1.0,
        "throughput/tokens_per_sec": 11_900.0,
        "time/step_sec": 0.34,
        "memory/peak_gb": 0.8,
    }
    if evaluated:
        record |= {"eval/loss": 5.0, "eval/loss_by_position/0-63": 5.5, "eval/loss_by_position/64-127": None}
    return record


def _run(folder: Path, steps: int, **files: str) -> Path:
    folder.mkdir()
    lines = [json.dumps(_record(step, step % 50 == 0 or steps == 1)) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return folder


def _is_png(path: Path) -> bool:
    content = path.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 2000


@pytest.mark.parametrize("steps", [1, 2, 30, 200])
def test_pictures_and_page_for_any_length(tmp_path: Path, steps: int) -> None:
    page = write_report(_run(tmp_path / "run", steps))
    pictures = {path.stem for path in page.parent.glob("*.png")}
    expected = {"loss", "throughput", "memory", "learning_rate", "grad_norm"}
    assert pictures == expected | ({"loss_by_position"} if steps in (1, 200) else set())
    assert all(_is_png(page.parent / f"{name}.png") for name in pictures)
    text = page.read_text()
    assert text.count("data:image/png;base64,") == len(pictures)
    assert "http" not in text.replace("data:", ""), "self-contained: nothing is fetched"


def test_page_shows_samples_stages_and_config_escaped(tmp_path: Path) -> None:
    rows = [{"prompt": "<script>alert(1)</script>", "continuation": "ok"}]
    figures = {"documents_read": 10, "kept": 7, "dropped": {"too_short": 3}}
    run = _run(
        tmp_path / "run",
        3,
        samples__jsonl=json.dumps({"step": 2, "rows": rows}) + "\n",
        config__yaml="name: my run\ntrainer: {steps: 3}\n",
        lineage__json=json.dumps({"curated": {"fingerprint": "f" * 64, "figures": figures}}),
        attempts__jsonl='{"attempt": 1, "error": "rank 1 was killed"}\n',
        status__json='{"state": "stopped"}',
    )
    text = write_report(run).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text
    for part in ("my run", "rank 1 was killed", "too_short 3", "stopped", "3 of 3", "trainer.steps"):
        assert part in text
    assert _is_png(run / "report" / "dropped.png")


def test_page_says_what_the_experts_did(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 3)
    assert "Experts" not in write_report(run).read_text()
    records = [
        _record(1, False) | {"moe/load_imbalance/text": 1.5},
        _record(2, False) | {"moe/causal_gap": -0.25, "moe/of_another_version": 1.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    text = write_report(run).read_text()
    assert "Experts" in text
    assert "moe/load_imbalance/text" in text
    assert "1.500" in text
    assert "-0.250 nats/token" in text


def test_a_run_still_going_may_have_torn_files(tmp_path: Path) -> None:
    run = _run(tmp_path / "run", 5, config__yaml="name: [half", status__json='{"sta', attempts__jsonl='{"a"')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/l')
    text = write_report(run).read_text()
    assert "unfinished" in text
    write_report(run)  # again, over the first


def test_a_killed_command_is_not_called_running(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    status = {"state": "running", "host": socket.gethostname()}
    gone = _run(tmp_path / "gone", 2, status__json=json.dumps(status | {"pid": ended.pid}))
    assert "killed: the same command goes on" in write_report(gone).read_text()
    for name, other in (("alive", {"pid": os.getpid()}), ("elsewhere", {"pid": ended.pid, "host": "other"})):
        text = write_report(_run(tmp_path / name, 2, status__json=json.dumps(status | other))).read_text()
        assert "running" in text
        assert "killed: the same" not in text


@pytest.mark.parametrize("content", [None, "", "not json\n"])
def test_nothing_to_report_is_an_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="run `sundog train` first"):
        write_report(tmp_path)


def test_smoothing_keeps_lines_straight() -> None:
    import numpy as np

    line = np.linspace(3.0, 1.0, 100)
    assert smooth(line) == pytest.approx(line)
    assert smooth(np.array([5.0])) == pytest.approx([5.0])


def test_the_load_of_experts_is_drawn_by_modality() -> None:
    assert plots.expert_load([_record(1, False)]) is None
    loads = {"moe/load_imbalance/text": 1.5, "moe/load_imbalance/image": 2.0, "moe/tokens_with_0/text": 0.4}
    figure = plots.expert_load([_record(step, False) | loads for step in (1, 2)])
    assert figure is not None
    assert [len(axes.lines) for axes in figure.axes] == [2, 1]

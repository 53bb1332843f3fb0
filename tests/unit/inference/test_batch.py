import json
from pathlib import Path
from typing import Any

import pytest

from conf.errors import DataError
from conf.serving import GenerateConfig
from data.stages import Unit, serial_units
from inference import batch
from inference.batch import RESULTS, generate_file
from inference.engine import Engine
from tests.unit.inference.builders import run


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def answers(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RESULTS).read_text().splitlines()]


def test_every_line_is_answered_in_order_and_a_killed_run_goes_on(
    engine: Engine, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(batch, "UNIT_LINES", 2)
    lines: list[Any] = [
        {"prompt": "the cat", "temperature": 0},
        {"id": "mine", "prompt": "a dog", "temperature": 0, "max_tokens": 3},
        "no json",
        {"messages": [{"role": "user", "content": "hi"}]},
        {"prompt": "the", "n": "many"},
    ]
    source, folder = write(tmp_path / "in.jsonl", lines), tmp_path / "out"
    settings = GenerateConfig(model=str(model_folder), max_tokens=5)
    calls: list[int] = []

    def killed(label: str, function: str, units: list[Unit]) -> list[Unit]:
        calls.append(len(units))
        serial_units(label, function, units[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate_file(source, folder, settings, killed)
    kept = (folder / "part-000000000.jsonl").stat().st_mtime_ns
    manifest = generate_file(source, folder, settings, serial_units)
    assert calls == [3]
    assert (folder / "part-000000000.jsonl").stat().st_mtime_ns == kept
    assert (manifest.figures["lines"], manifest.figures["errors"]) == (5, 2)
    first, second, third, fourth, fifth = answers(folder)
    assert first["text"] == run(engine, engine.encode("the cat"), max_tokens=5)[1]
    assert (second["id"], second["text"]) == ("mine", run(engine, engine.encode("a dog"), max_tokens=3)[1])
    assert "error" in third
    assert fourth["completion_tokens"] <= 5
    assert "n" in fifth["error"]
    assert generate_file(source, folder, settings, serial_units).reused


def test_inputs_that_cannot_be_read(model_folder: Path, tmp_path: Path):
    settings = GenerateConfig(model=str(model_folder))
    for source in (tmp_path / "none.jsonl", write(tmp_path / "empty.jsonl", [])):
        with pytest.raises(DataError, match="--input"):
            generate_file(source, tmp_path / "out", settings, serial_units)

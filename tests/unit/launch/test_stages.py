"""Data stages by their commands, without Ray."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.schema import RunConfig
from data.manifest import Manifest
from data.stages import serial_units
from launch import stages
from tests.unit.data.samples import make_config, write_jsonl


def test_prepare_takes_text_to_packed_tokens_and_does_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def here(config: RunConfig, logs: Path, stage: Callable[[Any], Manifest]) -> Manifest:
        del config, logs
        return stage(serial_units)

    monkeypatch.setattr(stages, "on_cluster", here)
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 20))
    assert stages.main("prepare", config) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.endswith("s]")] == ["curate", "order", "pack"]
    assert printed.count("report: ") == 2
    assert stages.main("prepare", config) == 0
    assert capsys.readouterr().out.count("nothing to do") == 3

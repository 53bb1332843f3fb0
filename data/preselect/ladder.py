"""The ladder: models, what each can do, and how much its pairs weigh; read from a table that a person can write.

``models: [{name, folder, ability, weight}]`` in YAML. ``folder`` is a Hugging Face folder or a GGUF file, relative to
the table. ``ability`` is a number, or a mapping from benchmarks to numbers whose mean counts; without it the built-in
evaluation measures the model. ``weight`` is 1 where it is left out.
"""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from conf.errors import DataError
from data.files import digest_json, file_digest, write_atomic

MODEL_FILES = (".safetensors", ".bin", ".gguf", ".json", ".model", ".txt", ".jinja")
ORIGIN = "sundog.json"  # where an export says where it comes from: no part of what a model computes
KEYS = ("name", "folder", "ability", "weight")


@dataclass(frozen=True)
class Rung:
    """One model. ``scores`` are its benchmarks, empty where the table has none."""

    name: str
    folder: str
    scores: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0

    @property
    def ability(self) -> float | None:
        return fmean(self.scores.values()) if self.scores else None


def read_ladder(path: str | Path) -> list[Rung]:
    """The rungs of a table. Raises DataError for a table that is missing, broken or has fewer than two models."""
    path = Path(path).expanduser()
    fix = "models: [{name: a, folder: runs/a/hf, ability: 41.5}, ...]"
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        rule = "preselect.ladder names a YAML table of models"
        raise DataError(str(path), str(error).splitlines()[0], rule, f"`sundog ladder` writes one; {fix}") from error
    rows = table.get("models") if isinstance(table, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(str(path), "no list of models", "a ladder is a list of models", fix)
    rungs = [_rung(row, f"{path}: models[{index}]", path.parent) for index, row in enumerate(rows)]
    names = [rung.name for rung in rungs]
    if len(rungs) < 2 or len(set(names)) < len(names):
        rule = "a ladder has at least two models, each with a name of its own"
        raise DataError(str(path), f"models {', '.join(names) or 'none'}", rule, "add a model, or rename one")
    return rungs


def write_ladder(path: str | Path, rungs: list[Rung]) -> None:
    """Writes a table that ``read_ladder`` reads, folders relative to it."""
    parent = Path(path).absolute().parent
    rows: list[dict[str, Any]] = []
    for rung in rungs:
        folder = Path(rung.folder).absolute()
        inside = folder.is_relative_to(parent)
        row: dict[str, Any] = {"name": rung.name, "folder": str(folder.relative_to(parent) if inside else folder)}
        row |= {"ability": dict(rung.scores)} if rung.scores else {}
        rows.append(row | {"weight": rung.weight})
    write_atomic(path, yaml.safe_dump({"models": rows}, sort_keys=False))


def _rung(row: dict[str, Any], where: str, parent: Path) -> Rung:
    unknown = sorted(set(row) - set(KEYS))
    folder, ability, weight = row.get("folder"), row.get("ability"), row.get("weight", 1.0)
    if unknown or not isinstance(folder, str) or not folder:
        value = f"unknown {', '.join(unknown)}" if unknown else "no folder"
        raise DataError(where, value, f"a model has {', '.join(KEYS)}; folder is needed", "correct the table")
    scores = {} if ability is None else ability if isinstance(ability, dict) else {"ability": ability}
    for key, number in [*scores.items(), ("weight", weight)]:
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < float("inf"):
            raise DataError(f"{where}: {key}", number, "abilities and weights are finite numbers", "correct the table")
    if weight < 0:
        raise DataError(f"{where}: weight", weight, "a weight is not negative", "0 leaves a model out")
    full = parent / Path(folder).expanduser()
    name = str(row.get("name") or full.name)
    return Rung(name, str(full), {str(key): float(value) for key, value in scores.items()}, float(weight))


def model_files(path: str | Path) -> list[Path]:
    """The files that decide a model's losses. Raises DataError where there are none."""
    path = Path(path).expanduser()
    found = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.suffix in MODEL_FILES and p.is_file())
    if not found:
        value, rule = "no model files" if path.is_dir() else "not there", "a Hugging Face model folder, or a GGUF file"
        raise DataError(str(path), value, rule, "check the folders of preselect.ladder")
    return found


def model_digest(path: str | Path) -> str:
    """SHA-256 over the contents of a model's files: weights, config, tokenizer. Raises DataError as ``model_files``."""
    return digest_json([[file.name, file_digest(file)] for file in model_files(path) if file.name != ORIGIN])

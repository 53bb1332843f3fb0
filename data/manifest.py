"""A stage's manifest: what made the folder, from which parent, and what came out. It is written last, so a folder
that has one is complete."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.errors import DataError
from data.files import canonical_json, read_json, write_atomic

NAME = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """The record of a finished stage.

    ``fingerprint`` digests everything that decides the output; ``parent`` is the fingerprint of the stage before, empty
    for the first. ``files`` maps names relative to the folder to their ``bytes`` and ``sha256``. ``lineage`` lists the
    ancestors, oldest first, each with its stage, fingerprint, config and figures. ``reused`` is true where a run found
    the stage finished; it is not stored.
    """

    stage: str
    fingerprint: str
    parent: str
    config: dict[str, Any]
    figures: dict[str, Any]
    files: dict[str, dict[str, Any]]
    created: str  # ISO 8601, UTC
    lineage: list[dict[str, Any]] = field(default_factory=list)
    reused: bool = False

    def ancestor(self) -> dict[str, Any]:
        """This stage as an entry of a child's lineage."""
        return {"stage": self.stage, "fingerprint": self.fingerprint, "config": self.config, "figures": self.figures}


FIELDS = [f.name for f in dataclasses.fields(Manifest) if f.name != "reused"]


def has_manifest(folder: str | Path) -> bool:
    """Whether the folder holds a finished stage."""
    return (Path(folder) / NAME).is_file()


def read_manifest(folder: str | Path, command: str = "") -> Manifest:
    """The manifest of a finished stage. Raises DataError when it is missing or broken and names ``command``."""
    path = Path(folder) / NAME
    if not path.is_file():
        fix = f"run `sundog {command}` first" if command else "run the stage that makes this folder first"
        raise DataError(str(folder), "no finished output here", f"{NAME} exists, it is written last", fix)
    stored = read_json(path)
    missing = [name for name in FIELDS if name not in stored] if isinstance(stored, dict) else ["everything"]
    if missing:
        rule = "a manifest has all of its fields"
        raise DataError(str(path), f"lacks {', '.join(missing)}", rule, "remove the folder and make it again")
    return Manifest(**{name: stored[name] for name in FIELDS})


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes manifest.json, atomically; call it after all other files of the folder are in place."""
    stored = {name: getattr(manifest, name) for name in FIELDS}
    canonical_json(stored)  # refuses NaN and values that JSON lacks before anything is written
    write_atomic(Path(folder) / NAME, json.dumps(stored, indent=1) + "\n")


def broken_files(folder: str | Path, files: dict[str, dict[str, Any]]) -> list[str]:
    """Names of recorded files that are missing or have another size."""
    folder = Path(folder)

    def size(name: str) -> int:
        path = folder / name
        return path.stat().st_size if path.is_file() else -1

    return [name for name, record in files.items() if size(name) != record["bytes"]]

"""Where a run comes from: the data stages behind it, its config, the code's revision. No torch."""

import functools
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import RunConfig
from data.files import digest_json
from data.manifest import has_manifest, read_manifest
from data.stages import stage_folders

FILE_NAME = "lineage.json"
PARTS = ("name", "run_dir", "seed", "model", "sharding", "sequence", "trainer", "cluster", "tracker")  # that train uses
DATA_PARTS = ("dir", "context", "attention", "positions", "eval_fraction")  # other keys are the data stages'
REVISION_VARIABLE = "SUNDOG_GIT_REVISION"  # for workers whose copy of the code has no .git


@functools.cache
def git_revision() -> str:
    """Return the revision of this code, with ``-dirty`` where tracked files changed, or ``unknown``."""
    given = os.environ.get(REVISION_VARIABLE, "")
    if given:
        return given
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else "unknown"


def config_digest(config: RunConfig) -> str:
    """Return the SHA-256 of the resolved config."""
    return digest_json(asdict(config))


def training_part(config: dict[str, Any]) -> dict[str, Any]:
    """Return what training on tokens reads of a config tree, without what other commands and stages do."""
    data = config.get("data", {})
    own = {key: config[key] for key in PARTS if key in config}
    return own | {"data": {key: data[key] for key in DATA_PARTS if key in data}}


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Return ``key old -> new`` for every leaf in which two config trees differ."""
    changes: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            changes += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            changes.append(f"{prefix}{key} {before} -> {after}")
    return changes


def stages(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the manifest of each data stage that left one, first stage first: the content of lineage.json."""
    folders = stage_folders(config)
    named = {"curated": folders.curated, "ordered": folders.ordered, "packed": folders.packed}
    return {name: asdict(read_manifest(folder)) for name, folder in named.items() if has_manifest(folder)}

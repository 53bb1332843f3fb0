"""What became of a document, and whether the stages' files are what their manifests say."""

import random
from pathlib import Path
from typing import Any

from conf.errors import DataError
from conf.schema import RunConfig
from data.annotators import column_file
from data.documents import read_batches, read_columns
from data.files import file_digest
from data.manifest import Manifest, has_manifest, read_manifest
from data.selection import part_file
from data.stages import stage_folders
from data.steps.kind import apply_edits

PREVIEW = 400  # characters


def why(config: RunConfig, name: str) -> dict[str, Any]:
    """The history of the document ``name``: where it was read, what each step measured, what was decided, what is left.

    Raises DataError when curation is not finished or never met such an id.
    """
    folders = stage_folders(config)
    curated = read_manifest(folders.curated, command="curate")
    documents, annotated = read_manifest(folders.documents), read_manifest(folders.annotated)
    for part in documents.figures["parts"]:
        ids = read_columns(folders.documents / part["file"], ["id"]).column(0).to_pylist()[: part["documents"]]
        for row in (row for row, found in enumerate(ids) if found == name):  # of an id met twice, the one that stays
            reason = _decision(folders.curated, curated, part, row)
            if reason is None or name not in ids[row + 1 :]:
                history = _document(folders.documents / part["file"], row)
                history["measured"] = _columns(folders.annotated, annotated, part, row)
                edits = [
                    value for step in history["measured"].values() for key, value in step.items() if "edits" in key
                ]
                text = apply_edits(history.pop("text"), [edit for some in edits for edit in some or []])
                return history | {"decision": f"dropped: {reason}" if reason else "kept", "text": text[:PREVIEW]}
    for file in (file for file in curated.files if file.startswith("rejected/skips")):
        for entry in read_columns(folders.curated / file).to_pylist():
            if entry["id"] == name:
                return {**entry, "decision": f"dropped: {entry['reason']}"}
    rule, fix = "an id of a document or record of the corpus", f"ids are in {folders.curated}/documents and rejected"
    raise DataError("ID", name, rule, fix)


def _decision(folder: Path, curated: Manifest, part: dict[str, Any], row: int) -> str | None:
    return read_columns(folder / part_file(curated, "decisions", part)).column("reason")[row].as_py()


def _document(path: Path, row: int) -> dict[str, Any]:
    names = ["id", "source", "url", "metadata", "text"]
    for batch in read_batches(path, names):
        if row < batch.num_rows:
            found = batch.slice(row, 1).to_pylist()[0]
            return {**found, "chars": len(found["text"]), "part": f"{path.name}, row {row}"}
        row -= batch.num_rows
    raise AssertionError("the row is in the part, as its ids were read")


def _columns(folder: Path, annotated: Manifest, part: dict[str, Any], row: int) -> dict[str, dict[str, Any]]:
    """The columns of each step for one document; hashes are left out."""
    found = {}
    for step, columns in annotated.figures["columns"].items():
        values = read_columns(folder / column_file(columns, part)).slice(row, 1).to_pylist()[0]
        found[step] = {key: value for key, value in values.items() if not isinstance(value, bytes)}
    return found


def verify(config: RunConfig, share: float, seed: int = 0) -> dict[str, tuple[int, int, list[str]]]:
    """Hashes a share of the files of every finished stage below ``data.dir`` (at least one of each) again.

    Returns, by folder: files, files hashed, names of those that are missing or not as recorded.
    """
    root = stage_folders(config).curated.parent
    chance, found = random.Random(seed), {}
    for folder in sorted(path for path in root.glob("*") if path.is_dir() and has_manifest(path)):
        files = read_manifest(folder).files
        sample = sorted(chance.sample(sorted(files), min(len(files), max(1, round(share * len(files))))))
        wrong = [name for name in sample if not _is_whole(folder / name, files[name])]
        found[folder.name] = (len(files), len(sample), wrong)
    if not found:
        raise DataError("data.dir", str(root), "a folder that holds finished stages", "run `sundog curate` first")
    return found


def _is_whole(path: Path, record: dict[str, Any]) -> bool:
    return path.is_file() and path.stat().st_size == record["bytes"] and file_digest(path) == record["sha256"]

"""What every stage shares: its folder, its fingerprint, its units of work and how a killed run goes on.

A stage is a folder. ``stage.json`` is written first and names the fingerprint; units of work write their files and
then a marker with the unit's result; ``manifest.json`` comes last. So a folder is empty, begun or complete, and each of
the three is visible. Units run wherever the caller's executor puts them (``RunUnits``): they share nothing but the
file system, take one dict and return one small dict.
"""

import functools
import importlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conf.errors import DataError
from conf.schema import RunConfig
from data.fence import OWNER, owned, working
from data.files import (
    LOCK,
    TEMPORARY,
    canonical_json,
    digest_json,
    file_digest,
    read_json,
    remove_temporaries,
    write_atomic,
    writing,
)
from data.manifest import NAME, Manifest, broken_files, has_manifest, read_manifest, write_manifest

Unit = dict[str, Any]
# (label of the phase, dotted function "data.curate:annotate_unit", units) -> results in the units' order
RunUnits = Callable[[str, str, list[Unit]], list[Unit]]

BEGUN = "stage.json"
OURS = {BEGUN, NAME, LOCK, OWNER}
KEY_DIGITS = 16  # hexadecimal, of a unit's fingerprint in the names of its files


@dataclass(frozen=True)
class StageFolders:
    """Absolute folders of a run's data stages; the first three users see, the others are intermediate."""

    curated: Path
    ordered: Path
    packed: Path
    tokenizer: Path
    documents: Path
    annotated: Path
    embedded: Path
    tokenized: Path
    image_codes: Path


def stage_folders(config: RunConfig) -> StageFolders:
    """Where the stages of a run live below ``data.dir``."""
    root = Path(config.data.dir).expanduser().absolute()
    kind = config.order.kind
    return StageFolders(
        curated=root / "curated",
        ordered=root / f"ordered-{kind}",
        packed=root / f"packed-{kind}-{config.data.context}",
        tokenizer=root / "tokenizer",
        documents=root / "documents",
        annotated=root / "annotated",
        embedded=root / "embedded",
        tokenized=root / "tokenized",
        image_codes=root / "image_codes",
    )


@dataclass(frozen=True)
class Stage:
    """One stage of one run: ``settings`` and ``inputs`` are JSON-like and hold everything that decides the output.

    The units of a ``keyed`` stage say what decides each of them, so those that a change does not touch are not run
    again. A ``store`` is keyed and names every file by its unit's key: the output of other settings stands beside.
    """

    name: str
    version: int  # of the code: raised when the same settings give other bytes
    folder: Path
    settings: dict[str, Any]
    parent: Manifest | None = None
    inputs: Any = None
    overwrite: bool = False
    keyed: bool = False
    store: bool = False
    markers: set[Path] = field(default_factory=set)  # of the units of this run
    owner: str = ""  # the token of the command at work in the folder (data.fence)

    @functools.cached_property
    def fingerprint(self) -> str:
        parent = self.parent.fingerprint if self.parent else ""
        return digest_json([self.name, self.version, self.settings, parent, self.inputs])

    def units(self, phase: str, work: Sequence[Unit], keys: Sequence[Any] | None = None) -> list[Unit]:
        """Adds to each unit where its files and its marker go and what it is a unit of.

        ``keys`` (JSON-like) say for a keyed stage what decides the files of each unit; ``key`` in the unit digests it.
        """
        units: list[Unit] = []
        for index, unit in enumerate(work):
            decided_by = [self.fingerprint, phase, index, unit] if keys is None else [self.version, phase, keys[index]]
            fingerprint = digest_json(decided_by)
            key = fingerprint[:KEY_DIGITS]
            marker = self.folder / "markers" / f"{phase}-{f'{index:05d}' if keys is None else key}.json"
            self.markers.add(marker)
            where = {"folder": str(self.folder), "marker": str(marker), "fingerprint": fingerprint, "key": key}
            where["owner"] = self.owner
            units.append({**unit, **where})
        return units


def unit(function: Callable[[Unit], Unit]) -> Callable[[Unit], Unit]:
    """Makes a unit function idempotent: a marker of the same unit whose files are still there answers in its place.

    ``function`` returns its result with ``files``: records by name, relative to the unit's folder (``record_files``).
    """

    @functools.wraps(function)
    def run(work: Unit) -> Unit:
        if (done := finished_unit(work)) is not None:
            return done
        with working(work):
            return finish_unit(work, function(work))

    return run


def finished_unit(work: Unit) -> Unit | None:
    """The stored result of a unit that was done before and whose files are still there."""
    marker = Path(work["marker"])
    if marker.is_file():
        done = read_json(marker)
        if done["fingerprint"] == work["fingerprint"] and not broken_files(work["folder"], done["result"]["files"]):
            return done["result"]
    return None


def finish_unit(work: Unit, result: Unit) -> Unit:
    """Writes a unit's marker and returns the result as a later run will find it."""
    stored = canonical_json({"fingerprint": work["fingerprint"], "result": result})
    write_atomic(work["marker"], stored)
    return json.loads(stored)["result"]  # the same, keys in order too, whether the work is new or was done before


def record_files(folder: str | Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of written files, for a unit's result and the manifest."""
    return {
        name: {"bytes": os.path.getsize(Path(folder) / name), "sha256": file_digest(Path(folder) / name)}
        for name in names
    }


def collect_files(results: Sequence[Unit]) -> dict[str, dict[str, Any]]:
    """The file records of several units as one."""
    return {name: record for result in results for name, record in result["files"].items()}


def serial_units(label: str, function: str, units: list[Unit]) -> list[Unit]:
    """Runs units one after another in this process: the executor of tests and small tools."""
    del label  # nothing shows progress here
    module, _, name = function.partition(":")
    run = getattr(importlib.import_module(module), name)
    return [run(unit) for unit in units]


def run_stage(stage: Stage, body: Callable[[Stage], tuple[dict[str, Any], dict[str, dict[str, Any]]]]) -> Manifest:
    """Runs ``body(stage) -> (figures, files)`` unless the folder already holds its result; returns the manifest.

    Raises DataError when the folder was made with other settings or from another parent (and ``overwrite`` is off), or
    holds files of somebody else.
    """
    rule, fix = "one process at a time works on a stage folder", "wait for the other run or choose another data.dir"
    with owned(stage.folder, rule, fix) as token:
        stage = replace(stage, owner=token)
        if (finished := _prepare(stage)) is not None:
            return finished
        figures, files = body(stage)
        remove_temporaries(stage.folder)
        if stage.keyed and (stage.overwrite or not stage.store):
            prune(stage, files)
        parent = stage.parent
        manifest = Manifest(
            stage=stage.name,
            fingerprint=stage.fingerprint,
            parent=parent.fingerprint if parent else "",
            config=stage.settings,
            figures=figures,
            files=files,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            lineage=[*parent.lineage, parent.ancestor()] if parent else [],
        )
        write_manifest(stage.folder, manifest)
        return manifest


def _prepare(stage: Stage) -> Manifest | None:
    """The finished manifest where nothing is to do; else the folder is ready for work that begins or goes on."""
    folder = stage.folder
    finished = read_manifest(folder) if has_manifest(folder) else None
    begun = read_json(folder / BEGUN) if (folder / BEGUN).is_file() else {"stage": stage.name, "fingerprint": ""}
    name = finished.stage if finished else begun.get("stage")
    if name != stage.name:
        raise DataError(str(folder), f"holds {name}", f"this folder is for {stage.name}", "choose another data.dir")
    found: str = finished.fingerprint if finished else begun["fingerprint"]
    if found and found != stage.fingerprint:
        if not (stage.overwrite or stage.store):
            raise _foreign(stage, finished, found)
        if not stage.keyed:
            clear(folder)
            found = ""
        finished = None
    if finished and not broken_files(folder, finished.files):
        return replace(finished, reused=True)
    if not found and (others := sorted(p.name for p in folder.iterdir() if not _is_ours(p))):
        raise DataError(
            str(folder), ", ".join(others[:3]), "a new stage starts in an empty folder", "choose another data.dir"
        )
    with writing(folder):
        (folder / NAME).unlink(missing_ok=True)  # a complete folder that lost a file is work in progress again
    remove_temporaries(folder)
    write_atomic(folder / BEGUN, canonical_json({"stage": stage.name, "fingerprint": stage.fingerprint}))
    return None


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to a stage that has not begun: a writer may have been killed at the very first."""
    return path.name in OURS or path.match(TEMPORARY)


def _foreign(stage: Stage, finished: Manifest | None, found: str) -> DataError:
    """The error for a folder that holds the output of other settings or of another parent."""
    parent = stage.parent.fingerprint if stage.parent else ""
    if finished and finished.parent != parent:
        value = f"made from parent {finished.parent[:16]}, the parent is now {parent[:16]}"
    else:
        value = f"made with settings {found[:16]}, this run has {stage.fingerprint[:16]}"
        changed = [k for k, v in stage.settings.items() if finished and finished.config.get(k) != v]
        value += f" (changed: {', '.join(changed)})" if changed else ""
    rule = f"a finished or begun {stage.name} folder is never mixed with other settings"
    return DataError(
        str(stage.folder), value, rule, "set data.overwrite=true to make it again, or choose another data.dir"
    )


def prune(stage: Stage, files: dict[str, dict[str, Any]]) -> None:
    """Removes from a keyed stage's folder what other settings left: files and markers that this run does not name."""
    wanted = {stage.folder / name for name in [*files, *OURS]} | stage.markers
    with writing(stage.folder):
        for path in sorted(stage.folder.rglob("*"), reverse=True):  # a folder comes after what is in it
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path not in wanted:
                path.unlink()


def clear(folder: Path) -> None:
    """Empties a stage folder: first it stops being complete, last it stops being ours, wherever a kill cuts in."""
    with writing(folder):
        for path in sorted(folder.iterdir(), key=lambda p: (p.name != NAME, p.name == BEGUN)):
            if path.name in (LOCK, OWNER):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()

"""Decisions: every document's reason to go, or none, from columns alone.

The rules of the steps judge one part at a time. What must be known of the whole corpus (repeats, near duplicates) is
decided by passes over the columns of all parts: each leaves the sorted numbers of the documents that it drops, and the
next looks at the rest. A unit of a pass holds the hashes of one bucket, so that memory is bounded by
``curation.bucket_documents`` and not by the corpus.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from conf.curate import CurationConfig
from data.annotators import column_file
from data.dedup import repeats
from data.documents import read_columns
from data.files import digest_json, read_json, write_atomic
from data.manifest import Manifest
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, unit
from data.steps import STEPS

DECISIONS = pa.schema([("reason", pa.string())])  # null: the document stays
Drops = list[dict[str, str]]  # what passes have dropped: reason, and file of the sorted document numbers, int64


@dataclass
class Deciding:
    """What a pass needs: run units, and what the units of a pass share (``shared``; ``key`` digests what decides it).

    ``files`` gathers the records of all files that were written.
    """

    stage: Stage
    run_units: RunUnits
    curation: CurationConfig
    documents: int
    shared: Unit
    key: str
    drops: Drops
    files: dict[str, dict[str, Any]]

    def units(self, label: str, function: str, work: list[Unit], keys: list[Unit] | None = None) -> list[Unit]:
        """Runs units of a pass: keyed by their own description (or ``keys``), the plan and what was dropped before."""
        before = [[drop["reason"], self.files[drop["file"]]["sha256"]] for drop in self.drops]
        decided_by = [[function, self.key, before, key] for key in keys or work]
        described = [{**self.shared, "drops": self.drops, **unit} for unit in work]
        units = self.stage.units(label.replace(" ", "-"), described, decided_by)
        results = self.run_units(f"curate: {label}", function, units)
        self.files |= collect_files(results)
        return results

    @property
    def buckets(self) -> int:
        """Into how many buckets one hash a document is spread."""
        return -(-self.documents // self.curation.bucket_documents)


def config_of(tree: dict[str, Any]) -> CurationConfig:
    """The config behind ``dataclasses.asdict(config)``."""
    kinds = {f.name: f.type for f in dataclasses.fields(CurationConfig) if isinstance(tree[f.name], dict)}
    groups: dict[str, Any] = {name: kind(**tree[name]) for name, kind in kinds.items() if isinstance(kind, type)}
    return CurationConfig(**{**tree, **groups})


def judge(stage: Stage, curation: CurationConfig, annotated: Manifest, source: Path, run_units: RunUnits) -> Deciding:
    """Applies the steps' rules to every part and lays out the plan that the passes share."""
    columns: dict[str, str] = annotated.figures["columns"]
    parts: list[dict[str, Any]] = annotated.figures["parts"]
    tree = dataclasses.asdict(curation)
    shared = {"annotated": str(source), "columns": columns, "curation": tree}
    digests = [[annotated.files[column_file(c, part)]["sha256"] for c in columns.values()] for part in parts]
    keys = [[tree, part["documents"], digest] for part, digest in zip(parts, digests, strict=True)]
    units = stage.units("rules", [{**shared, "part": part} for part in parts], keys)
    results = run_units("curate: rules", "data.decide:rules_unit", units)
    plan = [{**part, "codes": result["codes"]} for part, result in zip(parts, results, strict=True)]
    write_atomic(stage.folder / "plan.json", json.dumps(plan))
    files = collect_files(results) | record_files(stage.folder, ["plan.json"])
    return Deciding(
        stage=stage,
        run_units=run_units,
        curation=curation,
        documents=annotated.figures["documents"],
        shared=shared,
        key=digest_json([tree, digests, [part["documents"] for part in parts]]),
        drops=[],
        files=files,
    )


def reason_names(columns: dict[str, str]) -> list[str]:
    """The reasons of the active steps' rules; a code is an index into them, 0 stands for none."""
    return ["", *(reason for step in columns for reason in STEPS[step].REASONS)]


@unit
def rules_unit(work: Unit) -> Unit:
    """Judges one part by the rules of all steps: ``uint8 [documents]``, the code of the first reason that holds."""
    part, names = work["part"], reason_names(work["columns"])
    config = config_of(work["curation"])
    codes = np.zeros(part["documents"], dtype=np.uint8)
    for step, folder in work["columns"].items():
        if STEPS[step].REASONS:
            table = read_columns(Path(work["annotated"]) / column_file(folder, part)).slice(0, len(codes))
            for reason, mask in STEPS[step].reasons(table, config):
                codes[(codes == 0) & mask] = names.index(reason)
    name = f"rules/{Path(part['file']).stem}-{work['key']}.npy"
    write_array(Path(work["folder"]) / name, codes)
    return {"codes": name, "files": record_files(work["folder"], [name])}


def part_codes(work: Unit, part: dict[str, Any]) -> npt.NDArray[np.uint8]:
    """Codes of one part after the passes so far: drop ``i`` has the ``i``-th code behind those of the rules."""
    codes = np.load(Path(work["folder"]) / part["codes"])
    first, rules = part["first"], len(reason_names(work["columns"]))
    for index, drop in enumerate(work["drops"]):
        numbers = np.load(Path(work["folder"]) / drop["file"], mmap_mode="r")
        begin, end = np.searchsorted(numbers, [first, first + len(codes)])
        codes[numbers[begin:end] - first] = rules + index
    return codes


def survivors(
    work: Unit, step: str, names: list[str], share: tuple[int, int] = (0, 1)
) -> Iterator[tuple[npt.NDArray[np.int64], pa.Table]]:
    """For each part, numbers of the documents that no rule and no earlier pass drops, and their columns of a step.

    ``share`` (i, n): of every n-th part only, from part i on.
    """
    for part in read_json(Path(work["folder"]) / "plan.json")[share[0] :: share[1]]:
        stay = part_codes(work, part) == 0
        file = Path(work["annotated"]) / column_file(work["columns"][step], part)
        table = read_columns(file, names).slice(0, len(stay))
        yield np.flatnonzero(stay) + part["first"], table.filter(pa.array(stay))


def hash_rows(column: pa.ChunkedArray) -> npt.NDArray[np.uint64]:
    """A column of fixed-size binary values as ``uint64 [rows, bytes / 8]``."""
    words = column.type.byte_width // 8
    joined = b"".join(column.to_pylist()) if len(column) else b""
    return np.frombuffer(joined, dtype=np.uint64).reshape(-1, words)


def drop_repeats(deciding: Deciding, column: str, reason: str) -> None:
    """Drops all but the first of the documents that share a hash of the identity step."""
    work = [
        {"column": column, "reason": reason, "bucket": bucket, "buckets": deciding.buckets}
        for bucket in range(deciding.buckets)
    ]
    results = deciding.units(reason.replace("_", " "), "data.decide:repeats_unit", work)
    deciding.drops += [{"reason": reason, "file": result["drops"]} for result in results]


@unit
def repeats_unit(work: Unit) -> Unit:
    """Finds the repeats among the hashes of one bucket."""
    kept_numbers, kept_hashes = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.uint64)]
    for numbers, table in survivors(work, "identity", [work["column"]]):
        hashes = hash_rows(table.column(work["column"]))
        mine = hashes[:, 0] % np.uint64(work["buckets"]) == work["bucket"]
        kept_numbers.append(numbers[mine])
        kept_hashes.append(hashes[mine])
    numbers, hashes = np.concatenate(kept_numbers), np.concatenate(kept_hashes)
    dropped = numbers[repeats(hashes, np.ones(len(hashes), dtype=bool))]
    return write_drops(work, dropped)


def write_drops(work: Unit, numbers: npt.NDArray[np.int64]) -> Unit:
    """Writes the sorted numbers of dropped documents; the result of a unit that drops."""
    name = f"drops/{work['reason']}-{work['key']}.npy"
    write_array(Path(work["folder"]) / name, np.sort(numbers))
    return {"drops": name, "files": record_files(work["folder"], [name])}

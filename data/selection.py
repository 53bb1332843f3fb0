"""Selection: the documents that stay, with their edits, and the list of those that do not."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.annotators import column_file
from data.decide import DECISIONS, Deciding, part_codes, reason_names
from data.documents import SCHEMA, parquet_writer, read_batches, read_columns
from data.files import read_json
from data.ingest import REJECTED
from data.manifest import Manifest
from data.stages import Unit, record_files, unit
from data.steps import STEPS
from data.steps.kind import apply_edits

Edit = dict[str, Any]


def part_file(curated: Manifest, kind: str, part: dict[str, Any]) -> str:
    """The file of a kind (``decisions``, ``documents``, ``rejected``) that was made from a part of the corpus."""
    start = f"{kind}/{Path(part['file']).stem}-"
    return next(name for name in curated.files if name.startswith(start))


def conclude(deciding: Deciding) -> list[Unit]:
    """Writes the decisions of every part: ``kept`` and ``dropped`` (by reason) of each."""
    work = [{"part": part} for part in read_json(deciding.stage.folder / "plan.json")]
    return deciding.units("decisions", "data.selection:conclude_unit", work)


@unit
def conclude_unit(work: Unit) -> Unit:
    """Names the reason of every document of one part."""
    part = work["part"]
    names = [*reason_names(work["columns"]), *(drop["reason"] for drop in work["drops"])]
    codes = part_codes(work, part)
    reasons = pa.array([names[code] or None for code in codes], pa.string())
    name = f"decisions/{Path(part['file']).stem}-{work['key']}.parquet"
    with parquet_writer(Path(work["folder"]) / name, DECISIONS) as writer:
        writer.write_table(pa.table({"reason": reasons}, schema=DECISIONS))
    counts = Counter(names[code] for code in codes if code)
    return {
        "decisions": name,
        "kept": int((codes == 0).sum()),
        "dropped": dict(sorted(counts.items())),
        "files": record_files(work["folder"], [name]),
    }


@unit
def select_unit(work: Unit) -> Unit:
    """Splits one part into the documents that stay and the list of those that do not."""
    folder, part = Path(work["folder"]), work["part"]
    reasons = read_columns(folder / work["decisions"]).column("reason").combine_chunks()
    edits = _edits(work, len(reasons))
    name = f"{Path(part['file']).stem}-{work['key']}.parquet"
    kept_name, rejected_name = f"documents/{name}", f"rejected/{name}"
    place = chars = edited = 0
    with (
        parquet_writer(folder / kept_name, SCHEMA) as kept,
        parquet_writer(folder / rejected_name, REJECTED) as rejected,
    ):
        for batch in read_batches(Path(work["documents"]) / part["file"], SCHEMA.names):
            reason = reasons.slice(place, batch.num_rows)
            batch = batch.slice(0, len(reason))  # the limit may end inside this part
            table = pa.Table.from_batches([batch.filter(reason.is_null())]).cast(SCHEMA)
            rows = np.flatnonzero(reason.is_null().to_numpy(zero_copy_only=False)) + place
            texts = table.column("text").to_pylist()
            changed = {row: edits[at] for row, at in enumerate(rows.tolist()) if at in edits}
            for row, changes in changed.items():
                texts[row] = apply_edits(texts[row], changes)
            if changed:
                table = table.set_column(SCHEMA.get_field_index("text"), SCHEMA.field("text"), [texts])
            _write(kept, table)
            place += batch.num_rows
            edited += len(changed)
            chars += sum(map(len, texts))
            lost = {"id": batch["id"], "source": batch["source"], "reason": reason}
            lost["detail"] = pa.nulls(len(reason), "string")
            _write(rejected, pa.table(lost, schema=REJECTED).filter(reason.is_valid()))
    figures = {"file": kept_name, "kept": reasons.null_count, "chars": chars, "edited": edited}
    return {**figures, "files": record_files(folder, [kept_name, rejected_name])}


def _edits(work: Unit, documents: int) -> dict[int, list[Edit]]:
    """Edits of the part's rows, from all active steps that change texts."""
    found: dict[int, list[Edit]] = {}
    for step, folder in work["edits"].items():
        path = Path(work["annotated"]) / column_file(folder, work["part"])
        name = STEPS[step].EDITS
        for row, changes in enumerate(read_columns(path, [name]).slice(0, documents).column(name).to_pylist()):
            if changes:
                found.setdefault(row, []).extend(changes)
    return found


def _write(writer: pq.ParquetWriter, table: pa.Table) -> None:
    if table.num_rows:
        writer.write_table(table)

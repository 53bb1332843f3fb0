"""Curation: annotate every document once, then decide which ones stay.

Phase 1 reads the corpus, slice by slice, and stores documents with their features and hashes as columns (the folder
``annotated``). Phase 2 reads those columns alone, applies the rules and finds duplicates over the whole corpus.
Phase 3 writes the documents that stay and the list of those that do not. A changed threshold starts at phase 2.

Duplicates: of documents with equal normalised text, or with the same id, the first in corpus order (slice, row) that
passes the quality rules stays; the others are dropped as ``duplicate_text`` and ``duplicate_id``. An id names one
document in all that follows (rejected lists, orders, lineage), therefore a second one cannot stay.
"""

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from conf.schema import CurationConfig, RunConfig
from data.corpora import open_corpus, read_slice
from data.dedup import HASH_BYTES, id_hash, repeats, text_hash
from data.documents import (
    SCHEMA,
    Document,
    RowWriter,
    parquet_writer,
    read_batches,
    read_columns,
    row_writer,
)
from data.files import write_atomic
from data.filters import FEATURE_FIELDS, FEATURE_NAMES, Features, judge, measure
from data.manifest import Manifest
from data.stages import (
    RunUnits,
    Stage,
    Unit,
    clear,
    collect_files,
    record_files,
    run_stage,
    stage_folders,
    unit,
)

HASHES = ["text_hash", "id_hash"]
ANNOTATED = pa.schema([*SCHEMA, *FEATURE_FIELDS, *((name, pa.binary(HASH_BYTES)) for name in HASHES)])
REJECTED = pa.schema([(name, pa.string()) for name in ("id", "source", "reason", "detail")])
DECISIONS = pa.schema([("reason", pa.string())])  # null: the document stays


def curate(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Curates the corpus of ``config.data`` into ``{data.dir}/curated``.

    Figures: ``documents_read`` (documents, and records or files that gave none), ``kept``, ``dropped`` (counts by
    reason; kept and dropped add up to read), ``chars_kept``, ``parts``, ``licence``. Raises DataError when no document
    is usable, or the folders hold the output of other settings.
    """
    annotated = annotate(config, run_units)
    source, folder = stage_folders(config).annotated, stage_folders(config).curated
    thresholds = dataclasses.asdict(config.curation)
    stage = Stage("curate", 1, folder, thresholds, annotated, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = annotated.figures["parts"]
        work = {"source": str(source), "parts": parts, "skips": annotated.figures["skips"], "curation": thresholds}
        resolved = run_units("curate: resolve", "data.curate:resolve_unit", stage.units("resolve", [work]))[0]
        dropped = Counter(annotated.figures["skipped"]) + Counter(resolved["dropped"])
        if not resolved["kept"]:
            clear(folder)
            rule = "at least one document passes the quality rules"
            raise DataError(
                "curation", f"dropped all: {_table(dropped)}", rule, "loosen curation.* or use another corpus"
            )
        selects = [{"source": str(source), **part} for part in parts]
        results = run_units("curate: select", "data.curate:select_unit", stage.units("select", selects))
        ordered = dict(sorted(dropped.items(), key=lambda item: (-item[1], item[0])))
        write_atomic(folder / "dropped.json", json.dumps(ordered, indent=1) + "\n")
        figures = {
            "documents_read": resolved["kept"] + dropped.total(),
            "kept": resolved["kept"],
            "dropped": ordered,
            "chars_kept": resolved["chars_kept"],
            "parts": [{"file": result["file"], "documents": result["kept"]} for result in results],
            "licence": annotated.figures["licence"],
        }
        return figures, collect_files([resolved, *results]) | record_files(folder, ["dropped.json"])

    return run_stage(stage, body)


def annotate(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Reads the corpus into ``{data.dir}/annotated``: documents with the columns that decisions are made from."""
    data = config.data
    corpus = open_corpus(data)
    names = ("source", "format", "text_field", "id_field", "limit", "shard_documents")
    settings = {name: getattr(data, name) for name in names}
    folder = stage_folders(config).annotated
    stage = Stage("annotate", 1, folder, settings, inputs=corpus.inputs, overwrite=data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {"limit": data.limit, "shard_documents": data.shard_documents}
        work = [{**shared, "index": index, "slice": piece} for index, piece in enumerate(corpus.slices)]
        results = run_units("curate: read", "data.curate:annotate_unit", stage.units("annotate", work))
        figures: dict[str, Any] = {**_within_limit(results, data.limit), "licence": corpus.licence}
        if not figures["parts"]:
            clear(folder)
            value = f"no document in {data.path or data.source}; skipped: {_table(figures['skipped']) or 'nothing'}"
            rule = "a corpus has at least one readable document"
            raise DataError("data.path", value, rule, "check data.path, data.format and data.text_field")
        return figures, collect_files(results)

    return run_stage(stage, body)


def _table(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _within_limit(results: list[Unit], limit: int) -> dict[str, Any]:
    """The parts that hold the first ``limit`` documents (0: all), each with the number of its rows that count."""
    parts, skips, skipped = [], [], Counter[str]()
    room = limit or sum(part["documents"] for result in results for part in result["parts"])
    for result in results:
        if limit and room == 0:
            break
        skipped.update(result["skipped"])
        skips += [result["skips"]] if result["skipped"] else []
        for part in result["parts"]:
            take = min(room, part["documents"])
            room -= take
            parts += [{"file": part["file"], "documents": take}] if take else []
    return {"parts": parts, "skips": skips, "skipped": dict(skipped)}


@unit
def annotate_unit(work: Unit) -> Unit:
    """Reads one slice into parts of ``shard_documents`` rows of ``ANNOTATED``; what gives no document is listed."""
    folder, limit = Path(work["folder"]), work["limit"] or None
    skips, skipped = f"skips-{work['index']:05d}.parquet", Counter[str]()
    parts: list[Unit] = []
    with row_writer(folder / skips, REJECTED) as rejected:
        documents = itertools.islice(_documents(work["slice"], rejected, skipped), limit)
        while (first := next(documents, None)) is not None:
            name = f"part-{work['index']:05d}-{len(parts):05d}.parquet"
            with row_writer(folder / name, ANNOTATED) as rows:
                for document in itertools.chain([first], itertools.islice(documents, work["shard_documents"] - 1)):
                    rows.add(_annotated(document), len(document.text))
            parts.append({"file": name, "documents": rows.count})
    files = record_files(folder, [skips, *(part["file"] for part in parts)])
    return {"parts": parts, "skips": skips, "skipped": dict(sorted(skipped.items())), "files": files}


def _documents(piece: Unit, rejected: RowWriter, skipped: Counter[str]) -> Iterator[Document]:
    """The slice's documents; its skips go to the rejected list on the way."""
    for record in read_slice(piece):
        if isinstance(record, Document):
            yield record
        else:
            skipped[record.reason] += 1
            rejected.add(vars(record))


def _annotated(document: Document) -> dict[str, Any]:
    features = vars(measure(document.text))
    return {**document.row(), **features, "text_hash": text_hash(document.text), "id_hash": id_hash(document.id)}


@unit
def resolve_unit(work: Unit) -> Unit:
    """Decides on every document from its columns; one file of reasons a part. Memory: 34 bytes a document."""
    folder, source = Path(work["folder"]), Path(work["source"])
    curation = CurationConfig(**work["curation"])
    parts: list[dict[str, Any]] = work["parts"]
    reasons: list[list[str | None]] = []
    hashes: dict[str, list[np.ndarray[Any, Any]]] = {name: [] for name in HASHES}
    chars: list[int] = []
    for part in parts:
        table = read_columns(source / part["file"], [*FEATURE_NAMES, *HASHES]).slice(0, part["documents"])
        features = [Features(**row) for row in table.select(FEATURE_NAMES).to_pylist()]
        reasons.append([judge(row, curation) for row in features])
        chars += [row.chars for row in features]
        for name in HASHES:
            joined = b"".join(table.column(name).to_pylist())
            hashes[name].append(np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2))
    flat = list(itertools.chain.from_iterable(reasons))
    if curation.deduplicate:
        _mark(flat, np.concatenate(hashes["text_hash"]), "duplicate_text")
    _mark(flat, np.concatenate(hashes["id_hash"]), "duplicate_id")
    names, place = [], 0
    for part in parts:
        names.append(f"decisions/{part['file']}")
        with parquet_writer(folder / names[-1], DECISIONS) as writer:
            writer.write_table(pa.table({"reason": flat[place : place + part["documents"]]}, schema=DECISIONS))
        place += part["documents"]
    for skips in work["skips"]:
        names.append(f"rejected/{skips}")
        write_atomic(folder / names[-1], (source / skips).read_bytes())
    kept = [count for count, reason in zip(chars, flat, strict=True) if reason is None]
    dropped = dict(sorted(Counter(reason for reason in flat if reason is not None).items()))
    return {"kept": len(kept), "chars_kept": sum(kept), "dropped": dropped, "files": record_files(folder, names)}


def _mark(reasons: list[str | None], hashes: np.ndarray[Any, Any], reason: str) -> None:
    """Sets ``reason`` on the documents that stayed so far and repeat an earlier one that stayed."""
    candidates = np.array([given is None for given in reasons], dtype=bool)
    for row in np.flatnonzero(repeats(hashes, candidates)):
        reasons[row] = reason


@unit
def select_unit(work: Unit) -> Unit:
    """Splits one annotated part into the documents that stay and the list of those that do not."""
    folder, name = Path(work["folder"]), work["file"]
    reasons = read_columns(folder / "decisions" / name, ["reason"]).column("reason").combine_chunks()
    kept_name, rejected_name = f"documents/{name}", f"rejected/{name}"
    with (
        parquet_writer(folder / kept_name, SCHEMA) as kept,
        parquet_writer(folder / rejected_name, REJECTED) as rejected,
    ):
        place = 0
        for batch in read_batches(Path(work["source"]) / name, SCHEMA.names):
            reason = reasons.slice(place, batch.num_rows)
            batch = batch.slice(0, len(reason))  # the limit may end inside this part
            place += batch.num_rows
            _write(kept, pa.Table.from_batches([batch.filter(reason.is_null())]).cast(SCHEMA))
            lost = {
                "id": batch["id"],
                "source": batch["source"],
                "reason": reason,
                "detail": pa.nulls(len(reason), "string"),
            }
            _write(rejected, pa.table(lost, schema=REJECTED).filter(reason.is_valid()))
    count = reasons.null_count
    return {"file": kept_name, "kept": count, "files": record_files(folder, [kept_name, rejected_name])}


def _write(writer: pq.ParquetWriter, table: pa.Table) -> None:
    if table.num_rows:
        writer.write_table(table)

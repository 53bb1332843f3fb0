"""Ingest: the corpus as Parquet parts of documents in ``{data.dir}/documents``, one unit of work a slice of files.

Parts are named by what decides their content, so that a changed, added or removed file costs the slices that hold it.
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from conf.errors import DataError
from conf.schema import RunConfig
from data.corpora import open_corpus, read_slice
from data.documents import SCHEMA, Document, RowWriter, row_writer
from data.manifest import Manifest
from data.stages import RunUnits, Stage, Unit, clear, collect_files, record_files, run_stage, stage_folders, unit

REJECTED = pa.schema([(name, pa.string()) for name in ("id", "source", "reason", "detail")])


def ingest(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Reads the corpus of ``config.data``.

    Figures: ``parts`` (file, documents, first: the number of its first document, sha256), ``skips`` (files that list
    what gave no document), ``skipped`` (their reasons, counted), ``documents``, ``licence``. Raises DataError when
    there is no document.
    """
    data = config.data
    corpus = open_corpus(data)
    names = ("source", "format", "text_field", "id_field", "image_field", "limit", "shard_documents")
    settings = {name: getattr(data, name) for name in names}
    folder = stage_folders(config).documents
    stage = Stage("ingest", 3, folder, settings, inputs=corpus.inputs, overwrite=data.overwrite, keyed=True, store=True)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {"limit": data.limit, "shard_documents": data.shard_documents}
        work = [{**shared, "slice": piece.unit} for piece in corpus.slices]
        units = stage.units("read", work, [[shared, piece.key] for piece in corpus.slices])
        results = run_units("curate: read", "data.ingest:read_unit", units)
        figures: dict[str, Any] = {**_within_limit(results, data.limit), "licence": corpus.licence}
        if not figures["parts"]:
            clear(folder)
            value = f"no document in {data.path or data.source}; skipped: {table(figures['skipped']) or 'nothing'}"
            rule = "a corpus has at least one readable document"
            raise DataError("data.path", value, rule, "check data.path, data.format and data.text_field")
        return figures, collect_files(results)

    return run_stage(stage, body)


def table(counts: dict[str, int]) -> str:
    """Counts in one line."""
    return ", ".join(f"{reason} {count}" for reason, count in counts.items())


def _within_limit(results: list[Unit], limit: int) -> dict[str, Any]:
    """The parts that hold the first ``limit`` documents (0: all), each with the number of its rows that count."""
    parts: list[dict[str, Any]] = []
    skips, skipped, first = [], Counter[str](), 0
    room = limit or sum(part["documents"] for result in results for part in result["parts"])
    for result in results:
        if limit and first == limit:
            break
        skipped.update(result["skipped"])
        skips += [result["skips"]] if result["skipped"] else []
        for part in result["parts"]:
            if take := min(room - first, part["documents"]):
                digest = result["files"][part["file"]]["sha256"]
                parts.append({"file": part["file"], "documents": take, "first": first, "sha256": digest})
            first += take
    return {"parts": parts, "skips": skips, "skipped": dict(skipped), "documents": first}


@unit
def read_unit(work: Unit) -> Unit:
    """Reads one slice into parts of ``shard_documents`` rows of ``SCHEMA``; what gives no document is listed."""
    folder, limit, key = Path(work["folder"]), work["limit"] or None, work["key"]
    skips, skipped = f"skips/{key}.parquet", Counter[str]()
    parts: list[Unit] = []
    with row_writer(folder / skips, REJECTED) as rejected:
        documents = itertools.islice(_documents(work["slice"], rejected, skipped), limit)
        while (first := next(documents, None)) is not None:
            name = f"parts/{key}-{len(parts):05d}.parquet"
            with row_writer(folder / name, SCHEMA) as rows:
                for document in itertools.chain([first], itertools.islice(documents, work["shard_documents"] - 1)):
                    rows.add(document.row(), document.size())
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

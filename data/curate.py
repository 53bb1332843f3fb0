"""Curation: annotate every document once, then decide which ones stay.

1. Ingest reads the corpus, slice by slice, into Parquet parts of documents (``documents``).
2. Annotate lets every active step write its columns beside them (``annotated``).
3. Decide applies the steps' rules to the columns and finds repeats and near duplicates over the whole corpus.
4. Select writes the documents that stay and the list of those that do not (``curated``).

A changed threshold starts at 3, a changed model or list at 2 and for its step alone, a changed file of the corpus at 1
and for its slice alone. The first rule that a document breaks, in the order of ``data.steps.STEPS``, is the reason that
is counted; then come the passes over the corpus. Of documents with equal normalised text, or with the same id, the
first in corpus order (slice, row) of those that still stay is kept: an id names one document in all that follows
(rejected lists, orders, lineage), therefore a second one cannot stay.
"""

import dataclasses
import json
from collections import Counter
from typing import Any

from conf.errors import DataError
from conf.schema import RunConfig
from data.annotate import annotate
from data.decide import Deciding, drop_repeats, judge
from data.files import write_atomic
from data.ingest import ingest, table
from data.manifest import Manifest
from data.near import drop_near_duplicates
from data.preselect.select import select
from data.selection import conclude
from data.stages import RunUnits, Stage, Unit, clear, collect_files, record_files, run_stage, stage_folders
from data.steps import STEPS, identity


def curate(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Curates the corpus of ``config.data`` into ``{data.dir}/curated``.

    Figures: ``documents_read`` (documents, and records or files that gave none), ``kept``, ``dropped`` (counts by
    reason; kept and dropped add up to read), ``edited``, ``chars_kept``, ``parts``, ``licence``. Raises DataError when
    no document is usable, or the folders hold the output of other settings.
    """
    documents = ingest(config, run_units)
    annotated = annotate(config, documents, run_units)
    folders, settings = stage_folders(config), dataclasses.asdict(config.curation)
    stage = Stage("curate", 2, folders.curated, settings, annotated, overwrite=config.data.overwrite, keyed=True)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        deciding = judge(stage, config.curation, annotated, folders.annotated, run_units)
        passed = run_passes(deciding)
        decided = conclude(deciding)
        dropped = Counter(documents.figures["skipped"])
        for result in decided:
            dropped.update(result["dropped"])
        kept = sum(result["kept"] for result in decided)
        if not kept:
            clear(folders.curated)
            rule = "at least one document passes the quality rules"
            fix = "loosen curation.* or use another corpus"
            raise DataError("curation", f"dropped all: {table(_by_count(dropped))}", rule, fix)
        results = _select(deciding, decided, config, documents)
        skips = _copy_skips(config, documents)
        write_atomic(folders.curated / "dropped.json", json.dumps(_by_count(dropped), indent=1) + "\n")
        figures = {
            "documents_read": kept + dropped.total(),
            "kept": kept,
            "dropped": _by_count(dropped),
            "edited": sum(result["edited"] for result in results),
            "chars_kept": sum(result["chars"] for result in results),
            "parts": [{"file": result["file"], "documents": result["kept"]} for result in results],
            "licence": documents.figures["licence"],
            **passed,
        }
        own = record_files(folders.curated, ["dropped.json", *skips])
        return figures, deciding.files | collect_files(results) | own

    return run_stage(stage, body)


def run_passes(deciding: Deciding) -> dict[str, Any]:
    """The decisions that look at the whole corpus, in order; returns figures of theirs."""
    figures: dict[str, Any] = {}
    if deciding.curation.deduplicate:
        drop_repeats(deciding, identity.TEXT_HASH, "duplicate_text")
    if deciding.curation.minhash.enabled:
        figures["near_pairs"] = drop_near_duplicates(deciding)
    drop_repeats(deciding, identity.ID_HASH, "duplicate_id")
    if deciding.curation.preselect.enabled:
        select(deciding)
    return figures


def _select(deciding: Deciding, decided: list[Unit], config: RunConfig, documents: Manifest) -> list[Unit]:
    """Writes the parts that stay; a part whose documents, decisions and edits are the same is not written again."""
    stage, columns = deciding.stage, deciding.shared["columns"]
    edits = {step: folder for step, folder in columns.items() if STEPS[step].EDITS}
    work = [
        {"part": part, "decisions": result["decisions"], "edits": edits}
        for part, result in zip(documents.figures["parts"], decided, strict=True)
    ]
    verdicts = [result["files"][result["decisions"]]["sha256"] for result in decided]
    keys = [[unit["part"]["sha256"], verdict, edits] for unit, verdict in zip(work, verdicts, strict=True)]
    folders = {"documents": str(stage_folders(config).documents), "annotated": deciding.shared["annotated"]}
    units = stage.units("select", [{**folders, **unit} for unit in work], keys)
    return deciding.run_units("curate: select", "data.selection:select_unit", units)


def _copy_skips(config: RunConfig, documents: Manifest) -> list[str]:
    """The lists of what gave no document, beside those of the documents that were dropped."""
    folders, names = stage_folders(config), []
    for skips in documents.figures["skips"]:
        names.append(f"rejected/{skips.replace('/', '-')}")
        write_atomic(folders.curated / names[-1], (folders.documents / skips).read_bytes())
    return names


def _by_count(counts: dict[str, int]) -> dict[str, int]:
    """Counts, most frequent first."""
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

"""Corpora that real crawls have: one bad file among thousands, one enormous document, the same page again and again."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.curate import curate
from data.documents import Document, Skip
from data.order import order
from data.pack import pack
from data.readers import read_file
from data.stages import serial_units, stage_folders
from tests.unit.data.samples import TOPICS, make_config, text
from tests.unit.data.test_archives import response
from tests.unit.data.test_curate import kept, rejected

ENORMOUS = 100 * 2**20


def test_one_bad_file_among_two_thousand(tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    corpus.mkdir()
    for number in range(2000):
        row = {"id": f"d{number}", "text": text(TOPICS[number % 5], number, 5)}
        (corpus / f"{number:04d}.jsonl").write_text(json.dumps(row) + "\n")
    (corpus / "1234.jsonl").write_bytes(b"\x00\x01\x02" * 100)
    config = make_config(tmp_path, corpus, shard_documents=500)
    manifest = curate(config, serial_units)
    assert manifest.figures["dropped"] == {"not_text": 1}
    assert rejected(stage_folders(config).curated) == {"1234.jsonl": "not_text"}
    ids = [row["id"] for row in kept(stage_folders(config).curated, manifest)]
    assert ids == [f"d{number}" for number in range(2000) if number != 1234]


@pytest.mark.parametrize("form", ["jsonl.gz", "txt.gz", "parquet", "warc.gz"])
def test_a_document_of_100_megabytes_is_counted_and_costs_no_more_memory_than_its_kind(
    tmp_path: Path, form: str
) -> None:
    path = tmp_path / f"x.{form}"
    if form == "parquet":
        pq.write_table(pa.table({"text": ["before", "a" * ENORMOUS, "after"]}), path)
    elif form == "warc.gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for number, body in enumerate(("before", "a" * ENORMOUS, "after")):
                file.write(response(body, number, kind="text/plain"))
    else:
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b'{"text": "before"}\n{"text": "' if form == "jsonl.gz" else b"")
            for _ in range(ENORMOUS // 2**20):
                file.write(b"a" * 2**20)
            file.write(b'"}\n{"text": "after"}\n' if form == "jsonl.gz" else b"")
    tracemalloc.start()
    found = list(read_file(str(path), path.name, "auto"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    skipped = [record.reason for record in found if isinstance(record, Skip)]
    assert skipped == ["record_too_long"]
    assert [r.text for r in found if isinstance(r, Document)] == ([] if form == "txt.gz" else ["before", "after"])
    assert peak < (2.5 if form == "parquet" else 1.5) * ENORMOUS


def test_the_same_page_thousands_of_times_costs_comparisons_that_grow_with_their_number(tmp_path: Path) -> None:
    page = text("one page", 1, 10)
    rows = [{"id": f"d{i}", "text": page if i % 2 else f"{page}\nVisitor {i}."} for i in range(1000)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(tmp_path, tmp_path / "c.jsonl", shard_documents=400)
    config.curation.minhash.enabled = True
    manifest = curate(config, serial_units)
    assert [row["id"] for row in kept(stage_folders(config).curated, manifest)] == ["d0"]
    assert manifest.figures["dropped"] == {"duplicate_text": 499, "near_duplicate": 500}
    assert manifest.figures["near_pairs"]["proposed"] <= 2 * config.curation.minhash.bands * 501


def test_the_order_keeps_one_of_a_thousand_near_copies_that_know_a_few_each(tmp_path: Path) -> None:
    page = text("one page", 1, 30)
    rows = [{"id": f"d{i}", "text": page if i % 2 else f"{page}\nVisitor {i}."} for i in range(1000)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(tmp_path, tmp_path / "c.jsonl", shard_documents=400)
    config.curation.deduplicate = False
    curate(config, serial_units)
    figures = order(config, serial_units).figures
    assert (figures["documents"], figures["near_duplicates"]) == (1, 999)


def test_documents_without_text_are_counted_and_the_rest_goes_through_every_stage(tmp_path: Path) -> None:
    rows: list[dict[str, str | None]] = [{"id": f"d{i}", "text": text(TOPICS[i % 5], i)} for i in range(10)]
    rows[3:3] = [{"id": "none", "text": ""}, {"id": "space", "text": "  \n\t"}, {"id": "mark", "text": "\u200b"}]
    rows += [{"id": "null", "text": None}, {"id": "no field"}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = make_config(tmp_path, tmp_path / "c.jsonl")
    config.curation.min_chars, config.curation.minhash.enabled = 0, True
    manifest = curate(config, serial_units)
    assert manifest.figures["dropped"] == {"empty": 2, "few_letters": 1, "no_text_field": 2}
    assert rejected(stage_folders(config).curated) == {
        "none": "empty",
        "space": "empty",
        "mark": "few_letters",
        "c.jsonl:14": "no_text_field",
        "c.jsonl:15": "no_text_field",
    }
    assert order(config, serial_units).figures["documents"] == 10
    assert pack(config, serial_units).figures["documents"] == 10

"""Curation from end to end: what stays, what goes and why, and bad input of every kind."""

import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from conf.errors import DataError, ResourceError
from data.corpora import open_corpus, read_slice
from data.curate import curate
from data.documents import SCHEMA, Document
from data.manifest import Manifest, read_manifest
from data.stages import serial_units, stage_folders
from tests.unit.data.samples import TOPICS, make_config, text, write_jsonl


def kept(folder: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Rows of the curated documents, in order."""
    return [row for part in manifest.figures["parts"] for row in pq.read_table(folder / part["file"]).to_pylist()]


def rejected(folder: Path) -> dict[str, str]:
    tables = [pq.read_table(path) for path in sorted((folder / "rejected").glob("*.parquet"))]
    return {row["id"]: row["reason"] for table in tables for row in table.to_pylist()}


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_keeps_good_documents_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "c" / "a.jsonl", 20)
    write_jsonl(tmp_path / "c" / "b.jsonl", 5, start=20)
    config = make_config(tmp_path, tmp_path / "c")
    manifest = curate(config, serial_units)
    folder = stage_folders(config).curated
    rows = kept(folder, manifest)
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(25)]
    assert [row["text"] for row in rows] == [text(TOPICS[i % 5], i) for i in range(25)]
    assert manifest.figures["documents_read"] == manifest.figures["kept"] == 25
    assert manifest.figures["chars_kept"] == sum(len(row["text"]) for row in rows)
    assert manifest.figures["dropped"] == {}
    assert [entry["stage"] for entry in manifest.lineage] == ["ingest", "annotate"]
    assert pq.read_schema(folder / manifest.figures["parts"][0]["file"]).equals(SCHEMA)
    assert all(len(pq.read_table(folder / part["file"])) <= 8 for part in manifest.figures["parts"])
    assert curate(config, serial_units).reused


def test_one_bad_file_or_record_among_good_ones_is_counted(tmp_path: Path) -> None:
    corpus = tmp_path / "c"
    write_jsonl(corpus / "good.jsonl", 10)
    good, other = text("old maps", 1), text("new maps", 2)
    rows = [{"id": "twin", "text": "  " + good.upper()}, {"id": "first", "text": good}, {"id": "d3", "text": other}]
    long_line = {"id": "long", "text": "a" * 10_000_000}
    write_rows(
        corpus / "mixed.jsonl", [*rows, {"id": "x", "txt": 1}, "no json", long_line, {"id": "s", "text": "short"}]
    )
    (corpus / "image.txt").write_bytes(b"\x00\x01" * 1000)
    (corpus / "latin.txt").write_bytes("d\xe9j\xe0 vu \xe9t\xe9 ".encode("latin-1") * 50)
    packed = gzip.compress("\n".join(json.dumps({"text": text("ore", i)}) for i in range(50)).encode())
    (corpus / "cut.jsonl.gz").write_bytes(packed[:40])
    (corpus / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    config = make_config(tmp_path, corpus)
    manifest = curate(config, serial_units)
    assert manifest.figures["dropped"] == {
        "unreadable_file": 2,
        "duplicate_id": 1,
        "duplicate_text": 1,
        "invalid_json": 1,
        "no_text_field": 1,
        "not_text": 1,
        "too_long": 1,
        "too_short": 1,
        "wrong_encoding": 1,
    }
    folder = stage_folders(config).curated
    assert json.loads((folder / "dropped.json").read_text()) == manifest.figures["dropped"]
    assert rejected(folder) == {
        "cut.jsonl.gz": "unreadable_file",
        "cut.parquet": "unreadable_file",
        "d3": "duplicate_id",
        "first": "duplicate_text",
        "image.txt": "not_text",
        "latin.txt": "wrong_encoding",
        "long": "too_long",
        "mixed.jsonl:4": "no_text_field",
        "mixed.jsonl:5": "invalid_json",
        "s": "too_short",
    }
    assert manifest.figures["kept"] == len(kept(folder, manifest)) == 11
    assert manifest.figures["documents_read"] == 11 + 10


def test_duplicates_over_files_first_one_that_passes_stays(tmp_path: Path) -> None:
    same = text("steel", 1)
    write_rows(tmp_path / "c" / "a.jsonl", [{"id": "short", "text": "x"}, {"id": "one", "text": same}])
    write_rows(
        tmp_path / "c" / "b.jsonl", [{"id": "two", "text": same + "\n"}, {"id": "short", "text": text("tin", 2)}]
    )
    config = make_config(tmp_path, tmp_path / "c", shard_documents=1)
    manifest = curate(config, serial_units)
    assert [row["id"] for row in kept(stage_folders(config).curated, manifest)] == ["one", "short"]
    assert manifest.figures["dropped"] == {"duplicate_text": 1, "too_short": 1}
    config.curation.deduplicate, config.data.overwrite = False, True
    assert [r["id"] for r in kept(stage_folders(config).curated, curate(config, serial_units))] == [
        "one",
        "two",
        "short",
    ]


def test_changed_threshold_does_not_read_the_corpus_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 10)
    config = make_config(tmp_path, path)
    curate(config, serial_units)
    config.curation.min_chars = 100_000
    with pytest.raises(DataError, match="min_chars"):
        curate(config, serial_units)
    config.data.overwrite, config.curation.min_chars = True, 300

    def never(*_: object) -> None:
        pytest.fail("the corpus was read again")

    monkeypatch.setattr("data.ingest.read_slice", never)
    assert not curate(config, serial_units).reused


def test_changed_corpus_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "c.jsonl", 10)
    config = make_config(tmp_path, path)
    first = read_manifest(stage_folders(config).curated) if curate(config, serial_units) else None
    write_jsonl(path, 12)
    with pytest.raises(DataError, match=r"(?s)curated.*data\.overwrite"):
        curate(config, serial_units)
    config.data.overwrite = True
    second = curate(config, serial_units)
    assert first is not None
    assert (first.figures["kept"], second.figures["kept"]) == (10, 12)
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("limit", [1, 7, 8, 20, 99])
def test_limit_takes_the_first_documents_of_the_corpus(tmp_path: Path, limit: int) -> None:
    write_jsonl(tmp_path / "c" / "a.jsonl", 10)
    write_jsonl(tmp_path / "c" / "b.jsonl", 20, start=10)
    config = make_config(tmp_path, tmp_path / "c", limit=limit, shard_documents=4)
    manifest = curate(config, serial_units)
    assert manifest.figures["documents_read"] == min(limit, 30)
    rows = kept(stage_folders(config).curated, manifest)
    assert [row["id"] for row in rows] == [f"d{i}" for i in range(min(limit, 30))]


@pytest.mark.parametrize("content", [b"", b"\n\n", b"no json\n", b"\x00\x01\x02", b'{"body": "x"}\n'])
def test_corpus_without_documents_is_an_error_and_leaves_no_traces(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(content)
    config = make_config(tmp_path, path)
    with pytest.raises(DataError, match=r"data\.path"):
        curate(config, serial_units)
    write_jsonl(path, 3)
    assert curate(config, serial_units).figures["kept"] == 3  # nothing of the failure is in the way


def test_corpus_of_bad_documents_is_an_error(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_rows(tmp_path / "c.jsonl", [{"text": "short"}, {"text": "1 2 3 " * 100}]))
    with pytest.raises(DataError, match=r"few_letters 1, too_short 1|too_short 1, few_letters 1"):
        curate(config, serial_units)
    config.curation.min_chars = 5
    assert curate(config, serial_units).figures["kept"] == 1


def test_missing_path_and_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "gone", tmp_path / "empty"):
        with pytest.raises(DataError, match=r"data\.path"):
            curate(make_config(tmp_path, path), serial_units)


def test_output_below_a_file(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 3), dir=str(tmp_path / "c.jsonl" / "data"))
    with pytest.raises(DataError, match=r"c\.jsonl"):
        curate(config, serial_units)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, ResourceError), (errno.EACCES, DataError)])
@pytest.mark.parametrize("after", [1, 4, 9, 13])
def test_disk_that_fails_midway_leaves_work_to_go_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception], after: int
) -> None:
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 20))
    real, calls = os.replace, 0

    def replace(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(number, os.strerror(number))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(kind, match=str(tmp_path)):
        curate(config, serial_units)
    monkeypatch.undo()
    assert list((tmp_path / "data").rglob("*.tmp")) == []
    assert curate(config, serial_units).figures["kept"] == 20


def test_units_share_nothing_but_their_dict(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 20))

    def through_json(label: str, function: str, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
        done = serial_units(label, function, json.loads(json.dumps(units[::-1])))  # in another order
        return json.loads(json.dumps(done))[::-1]

    plain = make_config(tmp_path / "plain", tmp_path / "c.jsonl")
    assert curate(config, through_json).files == curate(plain, serial_units).files


def test_python_docs_are_documents_with_distinct_ids() -> None:
    config = make_config(Path("/nowhere"), "", source="python_docs", shard_documents=40)
    corpus = open_corpus(config.data)
    assert corpus.licence == "PSF-2.0"
    units = [piece.unit for piece in corpus.slices]
    pieces = [unit for unit in units if unit["kind"] == "topics" or "json/decoder.py" in unit["names"]]
    records = [record for piece in pieces for record in read_slice(piece)]
    found = {record.id: record for record in records if isinstance(record, Document)}
    assert "python/topic/for" in found
    assert found["python/source/json/decoder.py"].text.startswith('"""Implementation of JSONDecoder')
    assert found["python/doc/json.decoder.JSONDecoder"].text.startswith(
        "class json.decoder.JSONDecoder(object)\n\nSimple"
    )
    assert not any("/test/" in name for unit in units for name in unit.get("names", []))


def test_debian_docs_need_their_packages(tmp_path: Path) -> None:
    config = make_config(tmp_path, tmp_path, source="debian_docs")
    with pytest.raises(DataError, match="apt-get install linux-doc"):
        curate(config, serial_units)
    for i in range(210):
        path = tmp_path / "usr" / "share" / "doc" / f"package{i}" / "guide.rst.gz"
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(text("packages", i).encode(), mtime=0))
    manifest = curate(config, serial_units)
    assert manifest.figures["kept"] == 210
    assert "copyright" in manifest.figures["licence"]

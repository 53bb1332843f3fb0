"""Readers: what was written is read back, and every kind of broken input is a counted skip."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.errors import DataError
from data import readers
from data.documents import Document, Skip
from data.readers import detect_format, find_files, read_file

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)


def read(path: Path, form: str = "auto", **fields: Any) -> list[Document | Skip]:
    return list(read_file(str(path), path.name, form, **fields))


def documents(path: Path, form: str = "auto", **fields: str) -> list[Document]:
    records = read(path, form, **fields)
    assert all(isinstance(record, Document) for record in records), records
    return [record for record in records if isinstance(record, Document)]


def reasons(path: Path, form: str = "auto") -> list[str]:
    return [record.reason for record in read(path, form) if isinstance(record, Skip)]


def compress(path: Path, content: bytes) -> Path:
    """Writes content as the path's suffix says."""
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(content, mtime=0))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(content)
    else:
        path.write_bytes(content)
    return path


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, max_size=8), st.sampled_from(["", ".gz", ".zst"]), st.booleans(), st.integers(1, 64))
def test_jsonl_roundtrip(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], suffix: str, final_newline: bool, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("r") / f"corpus.jsonl{suffix}"
    lines = [json.dumps({"id": i, "text": t, "tag": "x"}, ensure_ascii=bool(i % 2)) for i, t in enumerate(texts)]
    compress(path, ("\n".join(lines) + "\n" * final_newline).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "CHUNK", chunk)
        found = documents(path)
    assert [d.text for d in found] == texts
    assert [d.id for d in found] == [str(i) for i in range(len(texts))]
    assert {d.metadata for d in found} <= {'{"tag": "x"}'}


@settings(max_examples=25, deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=8))
def test_parquet_roundtrip(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    path = tmp_path_factory.mktemp("r") / "corpus.parquet"
    pq.write_table(pa.table({"text": texts, "url": [f"u{i}" for i in range(len(texts))]}), path, row_group_size=3)
    found = documents(path)
    assert [d.text for d in found] == texts
    assert [(d.id, d.url) for d in found] == [(f"corpus.parquet:{i + 1}", f"u{i}") for i in range(len(texts))]


@settings(max_examples=25, deadline=None)
@given(TEXTS.filter(lambda t: "\0" not in t and not t.startswith("\ufeff")), st.sampled_from(["", ".gz", ".zst"]))
def test_text_roundtrip(tmp_path_factory: pytest.TempPathFactory, text: str, suffix: str) -> None:
    path = compress(tmp_path_factory.mktemp("r") / f"page.txt{suffix}", text.encode())
    [found] = documents(path)
    assert (found.text, found.id) == (text, path.name)


def test_two_gzip_members_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "two.txt.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert documents(path)[0].text == "one two"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_compression(tmp_path: Path, suffix: str) -> None:
    rows = [json.dumps({"id": i, "text": f"{i} " + str(pow(7, i + 400, 10**300))}) for i in range(20000)]
    path = compress(tmp_path / f"c.jsonl{suffix}", "\n".join(rows).encode())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    records = read(path)
    assert [r.reason for r in records if isinstance(r, Skip)] == ["unreadable_file"]
    before = [r for r in records if isinstance(r, Document)]
    assert 0 < len(before) < 20000
    assert [r.id for r in before] == [str(i) for i in range(len(before))]
    whole = compress(tmp_path / f"page.txt{suffix}", b"words " * 1000)
    whole.write_bytes(whole.read_bytes()[:-6])
    assert reasons(whole) == ["unreadable_file"]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.txt.zst", "x.parquet"])
def test_suffix_that_lies(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"neither compressed nor columns " * 10)
    assert reasons(tmp_path / name) == ["unreadable_file"]


def test_truncated_parquet(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["words"] * 1000}), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert reasons(path) == ["unreadable_file"]
    path.write_bytes(content[:8] + b"\xff" * 40 + content[48:])
    assert reasons(path) == ["unreadable_file"]


@pytest.mark.parametrize("name", ["image.txt", "image.jsonl"])
def test_binary_file_is_one_skip(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x89PNG\r\x00\x00\x00\nIHDR" * 500)
    assert reasons(tmp_path / name) == ["not_text"]


def test_invalid_utf8_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 au lait".encode("latin-1"))
    assert documents(tmp_path / "latin.txt")[0].text == "caf\ufffd au lait"
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n{"text": "\\ud800 alone"}\n')
    assert [d.text for d in documents(tmp_path / "latin.jsonl")] == ["caf\ufffd", "\ufffd alone"]
    (tmp_path / "mark.txt").write_bytes(b"\xef\xbb\xbfmarked")
    assert documents(tmp_path / "mark.txt")[0].text == "marked"


def test_bad_json_lines_are_skipped_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    nested = "[" * 100_000
    path.write_text(f'{{"text": "good"}}\nno json\n{{"txt": 1}}\n[1]\n{{"text": 5}}\n\n{nested}\n{{"text": "fine"}}')
    records = read(path)
    assert [r.text for r in records if isinstance(r, Document)] == ["good", "fine"]
    assert reasons(path) == ["invalid_json", "no_text_field", "invalid_json", "text_is_no_string", "invalid_json"]
    assert [r.id for r in records] == [f"x.jsonl:{i}" for i in (1, 2, 3, 4, 5, 7, 8)]


def test_parquet_without_text_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"body": ["a", None]}), tmp_path / "x.parquet")
    assert reasons(tmp_path / "x.parquet") == ["no_text_field"]
    records = read(tmp_path / "x.parquet", text_field="body")
    assert [type(r) for r in records] == [Document, Skip]


def test_long_line_is_read_and_a_longer_one_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "' + "a" * 10_000_000 + '"}\n{"text": "short"}\n')
    assert [len(d.text) for d in documents(path)] == [10_000_000, 5]
    monkeypatch.setattr(readers, "MAX_RECORD", 5_000_000)
    assert reasons(path) == ["record_too_long"]
    assert [r.text for r in read(path) if isinstance(r, Document)] == ["short"]
    (tmp_path / "big.txt").write_text("b" * 6_000_000)
    assert reasons(tmp_path / "big.txt") == ["record_too_long"]


def test_longest_line_at_the_end_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_RECORD", 100)
    monkeypatch.setattr(readers, "CHUNK", 30)
    (tmp_path / "x.jsonl").write_text('{"text": "s"}\n{"text": "' + "a" * 500)
    assert [type(r) for r in read(tmp_path / "x.jsonl")] == [Document, Skip]


def test_finding_files(tmp_path: Path) -> None:
    for name in ("b/two.txt", "a.jsonl", ".hidden/x.txt", "b/.secret", "b/one.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "b" / "dangling.txt").symlink_to(tmp_path / "gone")
    names = [entry["name"] for entry in find_files(str(tmp_path))]
    assert names == ["a.jsonl", "b/dangling.txt", "b/one.txt", "b/two.txt"]
    assert [entry["name"] for entry in find_files(str(tmp_path / "a.jsonl"))] == ["a.jsonl"]
    assert [entry["name"] for entry in find_files(f"{tmp_path}/**/*.txt")] == ["one.txt", "two.txt"]
    assert reasons(tmp_path / "b" / "dangling.txt") == ["unreadable_file"]
    for missing in (tmp_path / "gone", tmp_path / "*.csv", tmp_path / ".hidden" / "y"):
        with pytest.raises(DataError, match=r"data\.path"):
            find_files(str(missing))


def test_formats() -> None:
    expected = {
        "a.JSONL.GZ": "jsonl",
        "a.json": "jsonl",
        "a.pq": "parquet",
        "a.rst.zst": "text",
        "a": "text",
    }
    assert {name: detect_format(name) for name in expected} == expected
    assert detect_format("a.txt", "jsonl") == "jsonl"

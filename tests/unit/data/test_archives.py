"""Web archives, Hugging Face folders, remote file systems, large Parquet files."""

import gzip
import io
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fastwarc.warc import WarcRecord, WarcRecordType

from conf.errors import DataError
from data import corpora
from data.archives import read_archive
from data.corpora import open_corpus, read_slice
from data.documents import Document, Skip
from data.readers import detect_format, find_files, read_file
from tests.unit.data.samples import make_config, text

PAGE = "<html><head><title>T</title><script>var x</script></head><body><nav>menu</nav><p>{}</p></body></html>"


def record(kind: WarcRecordType, body: bytes, number: int, http: str = "") -> bytes:
    made = WarcRecord()
    made.init_headers(record_type=kind, record_urn=f"uuid:00000000-0000-0000-0000-{number:012d}".encode())
    made.headers["WARC-Target-URI"] = f"https://example.org/{number}"
    if http:
        made.headers["Content-Type"] = "application/http; msgtype=response"
    made.set_bytes_content(http.encode().replace(b"\n", b"\r\n") + body)
    out = io.BytesIO()
    made.write(out)
    return out.getvalue()


def response(html: str, number: int, status: str = "200 OK", kind: str = "text/html; charset=latin-1") -> bytes:
    head = f"HTTP/1.1 {status}\nContent-Type: {kind}\n\n"
    return record(WarcRecordType.response, html.encode("latin-1"), number, head)


def test_pages_and_texts_of_archives(tmp_path: Path) -> None:
    sentence = "The café at the bridge opens at nine, and it closes when the last guest has gone home. " * 3
    pages = [
        response(PAGE.format(sentence), 1),
        response("gone", 2, status="404 Not Found"),
        response("binary", 3, kind="image/png"),
        record(WarcRecordType.request, b"", 4, "GET / HTTP/1.1\n\n"),
    ]
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join(map(gzip.compress, pages)))
    found = list(read_file(str(path), "a.warc.gz", "auto"))
    assert isinstance(found[0], Document)
    assert found[0].text.strip() == sentence.strip()
    assert (found[0].url, found[0].id) == ("https://example.org/1", "urn:uuid:00000000-0000-0000-0000-000000000001")
    assert [item.reason for item in found[1:] if isinstance(item, Skip)] == ["http_status", "not_text"]

    wet = tmp_path / "b.warc.wet.gz"
    wet.write_bytes(gzip.compress(record(WarcRecordType.conversion, "naïve".encode(), 7)))
    assert detect_format(wet.name) == "warc"
    assert [item.text for item in read_file(str(wet), wet.name, "auto") if isinstance(item, Document)] == ["naïve"]


@pytest.mark.parametrize("compressed", [True, False])
def test_an_archive_that_is_cut_anywhere_gives_what_stands_before_and_says_so(compressed: bool) -> None:
    pages = [response(PAGE.format(text("ore", i)), i) for i in range(3)]
    pages = [gzip.compress(page) for page in pages] if compressed else pages
    whole, ends = b"".join(pages), np.cumsum([len(page) for page in pages])
    texts = [item.text for item in read_archive(io.BytesIO(whole), "whole.warc") if isinstance(item, Document)]
    assert len(texts) == 3
    for cut in range(1, len(whole)):
        found = list(read_archive(io.BytesIO(whole[:cut]), "cut.warc"))
        documents = [item for item in found if isinstance(item, Document)]
        reached = int((ends - (20 if compressed else 4) <= cut).sum())  # checksums and empty lines may be gone
        assert int((ends <= cut).sum()) <= len(documents) <= reached
        assert [item.text for item in documents] == texts[: len(documents)]
        if compressed and cut not in ends:
            assert isinstance(found[-1], Skip)
        if not compressed and not (reached and cut <= ends[reached - 1]):
            assert isinstance(found[-1], Skip)


def test_a_damaged_archive_gives_what_stands_before() -> None:
    whole = bytearray(b"".join(gzip.compress(response(PAGE.format(text("ore", i)), i)) for i in range(6)))
    middle = len(whole) // 2
    whole[middle : middle + 40] = bytes(40)
    *documents, last = read_archive(io.BytesIO(whole), "bad.warc.gz")
    assert 2 <= len(documents) <= 3
    assert all(isinstance(item, Document) for item in documents)
    assert isinstance(last, Skip)
    assert last.reason == "unreadable_file"
    assert len(list(read_archive(io.BytesIO(b"no archive at all"), "x.warc"))) == 1


def test_a_hugging_face_folder(tmp_path: Path) -> None:
    table = pa.table({"text": [text("tin", i) for i in range(5)], "label": list(range(5))})
    with (tmp_path / "data-00000-of-00001.arrow").open("wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("dataset_info.json", "state.json"):
        (tmp_path / name).write_text("{}")
    corpus = open_corpus(make_config(tmp_path, tmp_path).data)
    found = [record for piece in corpus.slices for record in read_slice(piece.unit)]
    assert [item.text for item in found if isinstance(item, Document)] == table.column("text").to_pylist()
    assert len(found) == 5
    (tmp_path / "broken.arrow").write_bytes(b"no arrow")
    assert isinstance(next(iter(read_file(str(tmp_path / "broken.arrow"), "broken.arrow", "auto"))), Skip)


def test_files_behind_a_url() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl.gz", gzip.compress(b'{"id": "one", "text": "x"}\n'))
    memory.pipe("/corpus/sub/b.txt", b"plain")
    memory.pipe("/corpus/.hidden", b"no")
    files = find_files("memory://corpus")
    assert [file["name"] for file in files] == ["a.jsonl.gz", "sub/b.txt"]
    found = [record for file in files for record in read_file(file["path"], file["name"], "auto")]
    assert [(item.id, item.text) for item in found if isinstance(item, Document)] == [
        ("one", "x"),
        ("sub/b.txt", "plain"),
    ]
    assert [file["name"] for file in find_files("memory://corpus/a.jsonl.gz")] == ["a.jsonl.gz"]
    assert [file["name"] for file in find_files("memory://corpus/sub/*.txt")] == ["b.txt"]
    for url in ("memory://nowhere", "nosuchprotocol://x"):
        with pytest.raises(DataError, match=r"data\.path"):
            find_files(url)


def test_a_large_parquet_file_is_read_in_ranges_with_the_same_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": [text("lead", i) for i in range(40)]}), path, row_group_size=5)
    config = make_config(tmp_path, path)
    whole = [record for piece in open_corpus(config.data).slices for record in read_slice(piece.unit)]
    monkeypatch.setattr(corpora, "SLICE_BYTES", 2000)
    pieces = open_corpus(config.data).slices
    assert len(pieces) > 2
    assert [record for piece in pieces for record in read_slice(piece.unit)] == whole
    assert len({str(piece.key) for piece in pieces}) == len(pieces)

"""WARC archives of web pages and WET archives of their text, read by fastwarc; text of pages by resiliparse."""

import json
import re
from collections.abc import Iterator
from typing import BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding
from resiliparse.parse.html import HTMLTree

from data.documents import Document, Skip

MAX_PAGE = 64 << 20  # bytes of a page; a longer one is skipped
HTML = re.compile(r"^(?:text/html|application/xhtml\+xml)\b", re.IGNORECASE)
PLAIN = re.compile(r"^text/plain\b", re.IGNORECASE)


def read_archive(stream: BinaryIO, name: str) -> Iterator[Document | Skip]:
    """A document for each response (WARC) or conversion (WET) record; ids are those of the records.

    Records of other kinds are no documents. A damaged archive gives what stands before the damage, then one skip.
    """
    kinds = WarcRecordType.response | WarcRecordType.conversion
    count = 0
    with stream:
        try:
            for record in ArchiveIterator(stream, record_types=kinds, parse_http=True):
                count += 1
                if (found := _read(record, name)) is not None:
                    yield found
        except Exception as error:  # the library raises what its decoders do
            yield Skip(name, name, "unreadable_file", f"after {count} records: {error}"[:200])
            return
    if not count:
        yield Skip(name, name, "no_records", "an archive has response or conversion records")


def _read(record: WarcRecord, name: str) -> Document | Skip | None:
    url, where = record.headers.get("WARC-Target-URI") or "", (record.record_id or name).strip("<>")
    if record.content_length > MAX_PAGE:
        return Skip(where, name, "record_too_long", f"more than {MAX_PAGE} bytes")
    content = record.reader.read()
    kind = "text/plain"
    if record.record_type == WarcRecordType.response:
        status = record.http_headers.status_code if record.http_headers else None
        if status != 200:
            return Skip(where, name, "http_status", str(status))
        kind = record.http_content_type or ""
    if HTML.match(kind):
        text = _text_of(content, record.http_charset)
    elif PLAIN.match(kind):
        text = content.decode("utf-8", errors="replace")
    else:
        return Skip(where, name, "not_text", kind[:100])
    metadata = {"date": record.headers.get("WARC-Date") or "", "archive": name}
    return Document(id=where, text=text, source=name, url=url, metadata=json.dumps(metadata, sort_keys=True))


def _text_of(content: bytes, charset: str | None) -> str:
    """The main text of a page, its encoding as declared, else guessed."""
    page = HTMLTree.parse(bytes_to_str(content, charset or detect_encoding(content) or "utf-8"))
    return extract_plain_text(page, main_content=True, alt_texts=False, links=False)

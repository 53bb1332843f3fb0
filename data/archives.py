"""WARC archives of web pages and WET archives of their text, read by fastwarc; text of pages by resiliparse."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

from fastwarc.warc import ArchiveIterator, WarcRecord, WarcRecordType
from resiliparse.extract.html2text import extract_plain_text
from resiliparse.parse.encoding import bytes_to_str, detect_encoding
from resiliparse.parse.html import HTMLTree

from data.documents import Document, Skip

GZIP, TAIL = b"\x1f\x8b", 1 << 16  # first bytes; bytes that hold any record's headers
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
            watched: Any = Watched(stream)  # has all that the library calls
            for record in ArchiveIterator(watched, record_types=kinds, parse_http=True):
                count += 1
                if (found := _read(record, name)) is not None:
                    yield found
            watched.check()
        except Exception as error:  # the library raises what its decoders do
            yield Skip(name, name, "unreadable_file", f"after {count} records: {error}"[:200])
            return
    if not count:
        yield Skip(name, name, "no_records", "an archive has response or conversion records")


class Watched:
    """The bytes of an archive, decompressed by a library that tells of a cut, and the last of them."""

    def __init__(self, stream: BinaryIO) -> None:
        raw = io.BufferedReader(stream)  # pyright: ignore[reportArgumentType] - has readinto
        self._stream = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == GZIP else raw
        self._tail, self._read = b"", 0
        self._damage: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        """The next bytes; none from damage on, which ``check`` tells of: the library above takes no exceptions."""
        try:
            content = b"" if self._damage else self._stream.read1(size)
        except (EOFError, OSError, zlib.error) as error:
            content, self._damage = b"", error
        self._read += len(content)
        self._tail = (self._tail + content)[-TAIL:] if len(content) < TAIL else content[-TAIL:]
        return content

    def tell(self) -> int:
        return self._read

    def check(self) -> None:
        """Raises what reading met, or EOFError where the last record that begins has headers without an end."""
        if self._damage:
            raise self._damage
        begins = self._tail.rfind(b"WARC/1.")
        if begins >= 0 and b"\r\n\r\n" not in self._tail[begins:]:
            raise EOFError("the last record has no end")


def _read(record: WarcRecord, name: str) -> Document | Skip | None:
    url, where = record.headers.get("WARC-Target-URI") or "", (record.record_id or name).strip("<>")
    if record.content_length > MAX_PAGE:
        return Skip(where, name, "record_too_long", f"more than {MAX_PAGE} bytes")
    length = record.content_length
    content = record.reader.read()
    if len(content) < length:
        raise EOFError(f"a record ends after {len(content)} of {length} bytes")
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

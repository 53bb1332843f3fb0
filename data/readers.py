"""Readers of the user's files: text, JSON lines and Parquet, plain or compressed, streamed in bounded memory.

A reader yields documents and skips; it never raises for what is inside a file. A file that breaks in the middle gives
the documents before the break and one skip.
"""

import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from data.documents import Document, Skip

CHUNK = 1 << 20  # bytes read at once
MAX_RECORD = 64 << 20  # bytes of one document or JSON line; a longer one is skipped
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
JSONL_SUFFIXES = {".jsonl", ".ndjson", ".json"}
Records = Iterator[Document | Skip]


def detect_format(name: str, wanted: str = "auto") -> str:
    """``text``, ``jsonl`` or ``parquet``: as asked, else by the name's suffix without that of a compression."""
    if wanted != "auto":
        return wanted
    path = Path(name.lower())
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return "jsonl" if suffix in JSONL_SUFFIXES else "parquet" if suffix in {".parquet", ".pq"} else "text"


def find_files(pattern: str) -> list[dict[str, Any]]:
    """Files of a path, folder (with its subfolders, without hidden files) or glob, sorted by name.

    Each as ``path`` (absolute), ``name`` (relative to what was named), ``bytes`` and ``mtime`` (ns). Raises DataError
    when nothing is there.
    """
    path = Path(pattern).expanduser()
    if path.is_file():
        root, found = path.parent, [path]
    elif path.is_dir():
        root, found = path, [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        root = Path(os.path.commonpath([p.parent for p in found])) if found else path
    named = sorted((file.relative_to(root).as_posix(), file) for file in found)
    visible = [(name, file) for name, file in named if not any(part.startswith(".") for part in name.split("/"))]
    if not visible:
        rule = "a file, a folder that holds files, or a glob that matches some"
        raise DataError("data.path", pattern or "(empty)", rule, "check the path, or use data=python_docs")
    return [_entry(name, file) for name, file in visible]


def _entry(name: str, file: Path) -> dict[str, Any]:
    try:
        status = file.stat()
    except OSError:  # a dangling link or a file that went away: its reader reports it
        return {"path": str(file.absolute()), "name": name, "bytes": 0, "mtime": 0}
    return {"path": str(file.absolute()), "name": name, "bytes": status.st_size, "mtime": status.st_mtime_ns}


def read_file(path: str, name: str, form: str, text_field: str = "text", id_field: str = "id") -> Records:
    """Documents and skips of one file in the given format (``auto`` looks at the name)."""
    try:
        match detect_format(name, form):
            case "jsonl":
                yield from _read_jsonl(path, name, text_field, id_field)
            case "parquet":
                yield from _read_parquet(path, name, text_field, id_field)
            case _:
                yield from _read_text(path, name)
    except (OSError, pa.ArrowException) as error:
        yield Skip(name, name, "unreadable_file", str(error)[:200])


def _chunks(path: str) -> Iterator[bytes]:
    """The file's content, decompressed according to its suffix. Raises OSError when it is truncated or damaged."""
    compression = COMPRESSIONS.get(Path(path).suffix.lower())
    with open(path, "rb") as raw, pa.input_stream(raw, compression=compression) as stream:
        while chunk := stream.read(CHUNK):
            yield chunk


def looks_binary(start: bytes) -> bool:
    """Whether a file's first bytes hold NULs, which no text in UTF-8 has."""
    return b"\0" in start


def decode(content: bytes) -> str:
    """UTF-8 without a byte order mark; what is no UTF-8 becomes U+FFFD, for the quality rules to judge."""
    return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8", errors="replace")


def _read_text(path: str, name: str) -> Records:
    content = bytearray()
    for chunk in _chunks(path):
        if looks_binary(chunk):
            yield Skip(name, name, "not_text", "NUL bytes")
            return
        content += chunk
        if len(content) > MAX_RECORD:
            yield Skip(name, name, "record_too_long", f"more than {MAX_RECORD} bytes")
            return
    yield Document(id=name, text=decode(bytes(content)), source=name)


def _lines(path: str) -> Iterator[bytes | None]:
    """Lines without their ends; None stands for one that is longer than MAX_RECORD."""
    rest, skipping = bytearray(), False
    for chunk in _chunks(path):
        *complete, last = chunk.split(b"\n")
        for piece in complete:
            line = bytes(rest + piece) if rest else piece
            yield None if skipping or len(line) > MAX_RECORD else line
            rest, skipping = bytearray(), False
        rest += last
        if len(rest) > MAX_RECORD:
            rest, skipping = bytearray(), True
    if rest or skipping:
        yield None if skipping else bytes(rest)


def _read_jsonl(path: str, name: str, text_field: str, id_field: str) -> Records:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{name}:{number}"
        if line is None:
            yield Skip(where, name, "record_too_long", f"more than {MAX_RECORD} bytes")
        elif number == 1 and looks_binary(line[:CHUNK]):
            yield Skip(name, name, "not_text", "NUL bytes")
            return
        elif line.strip():
            try:
                fields = json.loads(decode(line))
            except (ValueError, RecursionError) as error:
                yield Skip(where, name, "invalid_json", str(error)[:200])
                continue
            yield _record(fields, where, name, text_field, id_field)


def _read_parquet(path: str, name: str, text_field: str, id_field: str) -> Records:
    with pq.ParquetFile(path) as file:
        if text_field not in file.schema_arrow.names:
            yield Skip(name, name, "no_text_field", f"columns: {', '.join(file.schema_arrow.names)}"[:200])
            return
        row = 0
        for batch in file.iter_batches(batch_size=64):
            for fields in batch.to_pylist():
                row += 1
                yield _record(fields, f"{name}:{row}", name, text_field, id_field)


def _record(fields: Any, where: str, name: str, text_field: str, id_field: str) -> Document | Skip:
    """A document of a JSON object or a Parquet row: its other fields become metadata."""
    if not isinstance(fields, dict):
        return Skip(where, name, "invalid_json", "not an object")
    text = fields.get(text_field)
    if not isinstance(text, str):
        reason = "no_text_field" if text is None else "text_is_no_string"
        return Skip(where, name, reason, f"fields: {', '.join(map(str, fields))}"[:200])
    given, url = fields.get(id_field), fields.get("url")
    rest = {k: v for k, v in fields.items() if k not in (text_field, id_field, "url")}
    return Document(
        id=encodable(str(given)) if given is not None else where,
        text=encodable(text),
        source=name,
        url=encodable(url) if isinstance(url, str) else "",
        metadata=json.dumps(rest, sort_keys=True, default=str),
    )


def encodable(text: str) -> str:
    """The text with lone surrogates (JSON can spell them, UTF-8 cannot) as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

"""Readers of the user's files, streamed in bounded memory: text, JSON lines, Parquet, Arrow (Hugging Face datasets),
WARC and WET archives; plain or compressed, local or at any URL that fsspec opens.

A reader yields documents and skips; it never raises for what is inside a file. A file that breaks in the middle gives
the documents before the break and one skip.
"""

import base64
import glob
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from data.archives import read_archive
from data.documents import Document, Skip
from data.images import BadImage, attach

CHUNK = 1 << 20  # bytes read at once
MAX_RECORD = 64 << 20  # bytes of one document or JSON line; a longer one is skipped
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".pq": "parquet"}
FORMATS |= {".arrow": "arrow", ".warc": "warc", ".wet": "warc"}
NO_DATA = {"dataset_info.json", "state.json", "dataset_dict.json"}  # what Hugging Face datasets writes beside the data
Records = Iterator[Document | Skip]


@dataclass(frozen=True)
class Fields:
    """What records call their text, their id and their images, and the folder that paths of images start from."""

    text: str
    id: str
    images: str
    folder: str


def detect_format(name: str, wanted: str = "auto") -> str:
    """``text``, ``jsonl``, ``parquet``, ``arrow`` or ``warc``: as asked, else by the suffix before a compression's."""
    if wanted != "auto":
        return wanted
    path = Path(name.lower())
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix
    return FORMATS.get(suffix, "text")


def is_url(path: str) -> bool:
    """Whether a path names a file system, as in ``s3://bucket/key`` or ``memory://folder``."""
    return "://" in path


def find_files(pattern: str) -> list[dict[str, Any]]:
    """Files of a path, folder (with its subfolders, without hidden files), glob or URL of these, sorted by name.

    Each as ``path`` (absolute), ``name`` (relative to what was named), ``bytes`` and ``mtime`` (ns; of a URL what its
    file system knows of the version). Raises DataError when nothing is there.
    """
    if is_url(pattern):
        return _find_remote(pattern)
    path = Path(pattern).expanduser()
    if path.is_file():
        root, found = path.parent, [path]
    elif path.is_dir():
        root, found = path, [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    else:
        found = [Path(match) for match in glob.glob(str(path), recursive=True) if Path(match).is_file()]
        root = Path(os.path.commonpath([p.parent for p in found])) if found else path
    named = sorted((file.relative_to(root).as_posix(), file) for file in found)
    visible = [(name, file) for name, file in named if _is_data(name)]
    if not visible:
        raise _nothing(pattern)
    return [_entry(name, file) for name, file in visible]


def _is_data(name: str) -> bool:
    *_, last = parts = name.split("/")
    return last not in NO_DATA and not any(part.startswith(".") for part in parts)


def _nothing(pattern: str, reason: str = "") -> DataError:
    rule = "a file, a folder that holds files, or a glob that matches some"
    value = f"{pattern or '(empty)'}{': ' if reason else ''}{reason}"
    return DataError("data.path", value, rule, "check the path, or use data=python_docs")


def _find_remote(url: str) -> list[dict[str, Any]]:
    try:
        system, root = fsspec.core.url_to_fs(url)
        if system.isfile(root):
            found, root = [root], root.rpartition("/")[0]
        elif system.isdir(root):
            found = system.find(root)
        else:
            found, root = [path for path in system.glob(root) if system.isfile(path)], root.partition("*")[0]
            root = root.rpartition("/")[0]
        entries = []
        for path in sorted(found):
            about = system.info(path)
            name = path.removeprefix(root).lstrip("/")
            version = next(
                (str(about[k]) for k in ("ETag", "etag", "mtime", "LastModified", "created") if k in about), ""
            )
            full = system.unstrip_protocol(path)
            entries.append({"path": full, "name": name, "bytes": about.get("size") or 0, "mtime": version})
    except (OSError, ValueError, ImportError) as error:  # such as an unknown protocol, or one whose package is missing
        raise _nothing(url, str(error)[:200]) from error
    if not (visible := [entry for entry in entries if _is_data(entry["name"])]):
        raise _nothing(url)
    return visible


def open_file(path: str) -> BinaryIO:
    """Opens a local path or a URL for reading. Raises OSError."""
    if not is_url(path):
        return open(path, "rb")
    system, inside = fsspec.core.url_to_fs(path)
    return system.open(inside, "rb")


def _entry(name: str, file: Path) -> dict[str, Any]:
    try:
        status = file.stat()
    except OSError:  # a dangling link or a file that went away: its reader reports it
        return {"path": str(file.absolute()), "name": name, "bytes": 0, "mtime": 0}
    return {"path": str(file.absolute()), "name": name, "bytes": status.st_size, "mtime": status.st_mtime_ns}


def read_file(
    path: str,
    name: str,
    form: str,
    text_field: str = "text",
    id_field: str = "id",
    image_field: str = "",
    row_groups: tuple[int, int] | None = None,
) -> Records:
    """Documents and skips of one file in the given format (``auto`` looks at the name).

    ``image_field``: of records that hold images (see ``data.images.attach``); empty: text only. ``row_groups``: of a
    Parquet file, from the first to before the second only.
    """
    fields = Fields(text_field, id_field, image_field, path.rpartition("/")[0])
    try:
        match detect_format(name, form):
            case "jsonl":
                yield from _read_jsonl(path, name, fields)
            case "parquet":
                yield from _read_parquet(path, name, fields, row_groups)
            case "arrow":
                yield from _read_arrow(path, name, fields)
            case "warc":
                yield from read_archive(open_file(path), name)
            case _:
                yield from _read_text(path, name)
    except (OSError, pa.ArrowException) as error:
        yield Skip(name, name, "unreadable_file", str(error)[:200])


def _chunks(path: str) -> Iterator[bytes]:
    """The file's content, decompressed according to its suffix. Raises OSError when it is truncated or damaged."""
    compression = COMPRESSIONS.get(Path(path).suffix.lower())
    with open_file(path) as raw, pa.input_stream(raw, compression=compression) as stream:
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


def _read_jsonl(path: str, name: str, fields: Fields) -> Records:
    for number, line in enumerate(_lines(path), start=1):
        where = f"{name}:{number}"
        if line is None:
            yield Skip(where, name, "record_too_long", f"more than {MAX_RECORD} bytes")
        elif number == 1 and looks_binary(line[:CHUNK]):
            yield Skip(name, name, "not_text", "NUL bytes")
            return
        elif line.strip():
            try:
                row = json.loads(decode(line))
            except (ValueError, RecursionError) as error:
                yield Skip(where, name, "invalid_json", str(error)[:200])
                continue
            yield _record(row, where, name, fields)


def split_parquet(path: str, size: int) -> list[tuple[int, int]]:
    """Ranges of row groups of about ``size`` bytes each; none where the file cannot be read."""
    try:
        with open_file(path) as raw, pq.ParquetFile(raw) as file:
            groups = [file.metadata.row_group(group).total_byte_size for group in range(file.num_row_groups)]
    except (OSError, pa.ArrowException):  # its reader reports it
        return []
    cuts, held = [0], 0
    for group, nbytes in enumerate(groups):
        if held and held + nbytes > size:
            cuts.append(group)
            held = 0
        held += nbytes
    return list(zip(cuts, [*cuts[1:], len(groups)], strict=True))


def _read_parquet(path: str, name: str, fields: Fields, row_groups: tuple[int, int] | None) -> Records:
    with open_file(path) as raw, pq.ParquetFile(raw) as file:
        if fields.text not in file.schema_arrow.names:
            yield Skip(name, name, "no_text_field", f"columns: {', '.join(file.schema_arrow.names)}"[:200])
            return
        first, last = row_groups or (0, file.num_row_groups)
        number = sum(file.metadata.row_group(group).num_rows for group in range(first))
        for batch in file.iter_batches(batch_size=64, row_groups=list(range(first, last))):
            for row in batch.to_pylist():
                number += 1
                yield _record(row, f"{name}:{number}", name, fields)


def _read_arrow(path: str, name: str, fields: Fields) -> Records:
    """A file of a Hugging Face dataset as ``save_to_disk`` writes it: an Arrow stream."""
    number = 0
    with open_file(path) as raw, pa.ipc.open_stream(raw) as batches:
        for batch in batches:
            for start in range(0, batch.num_rows, 64):
                for row in batch.slice(start, 64).to_pylist():
                    number += 1
                    yield _record(row, f"{name}:{number}", name, fields)


def _record(row: Any, where: str, name: str, fields: Fields) -> Document | Skip:
    """A document of a JSON object or a Parquet row: its other fields become metadata."""
    if not isinstance(row, dict):
        return Skip(where, name, "invalid_json", "not an object")
    text = row.get(fields.text)
    if not isinstance(text, str):
        reason = "no_text_field" if text is None else "text_is_no_string"
        return Skip(where, name, reason, f"fields: {', '.join(map(str, row))}"[:200])
    if len(text) > MAX_RECORD // 4 and len(text.encode(errors="replace")) > MAX_RECORD:
        return Skip(where, name, "record_too_long", f"more than {MAX_RECORD} bytes")
    given, url = row.get(fields.id), row.get("url")
    known = {fields.text, fields.id, fields.images, "url"}
    document = Document(
        id=encodable(str(given)) if given is not None else where,
        text=encodable(text),
        source=name,
        url=encodable(url) if isinstance(url, str) else "",
        metadata=json.dumps({k: v for k, v in row.items() if k not in known}, sort_keys=True, default=str),
    )
    if not fields.images:
        return document
    try:
        return attach(document, [_image_bytes(image, fields.folder) for image in row.get(fields.images) or []])
    except BadImage as error:
        return Skip(where, name, error.reason, str(error)[:200])


def _image_bytes(image: Any, folder: str) -> bytes:
    """An image as a file's bytes: bytes, base64 in a data URL, a path or URL (relative ones to the file that names it),
    or ``{bytes, path}`` as Hugging Face datasets store it. Raises BadImage."""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes):
        return image
    if not isinstance(image, str):
        raise BadImage("broken_image", f"neither bytes nor a path: {type(image).__name__}")
    try:
        if image.startswith("data:"):
            return base64.b64decode(image.partition(",")[2], validate=True)
        with open_file(image if is_url(image) or image.startswith("/") else f"{folder}/{image}") as file:
            content = file.read(MAX_RECORD + 1)
    except (OSError, ValueError) as error:
        raise BadImage("broken_image", f"{image[:80]}: {error}") from error
    if len(content) > MAX_RECORD:
        raise BadImage("record_too_long", f"{image[:80]}: more than {MAX_RECORD} bytes")
    return content


def encodable(text: str) -> str:
    """The text with lone surrogates (JSON can spell them, UTF-8 cannot) as U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text

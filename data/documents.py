"""The document schema and its Parquet files: read and written in batches, so that memory stays bounded."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from conf.errors import DataError
from data.files import atomic_path

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("source", pa.string()),
        ("modality", pa.string()),
        ("url", pa.string()),
        ("metadata", pa.string()),  # a JSON object
        ("scores", pa.map_(pa.string(), pa.float32())),
        ("images", pa.list_(pa.binary())),  # files that marks in the text stand for (data.images)
    ]
)
BATCH_ROWS = 256  # rows of a row group at most
BATCH_CHARS = 8_000_000  # characters and bytes of a row group, about


@dataclass(frozen=True)
class Document:
    """One document. ``id`` is unique in its corpus and does not depend on how the reading is split."""

    id: str
    text: str
    source: str = ""
    modality: str = "text"
    url: str = ""
    metadata: str = "{}"
    scores: dict[str, float] = field(default_factory=dict)
    images: tuple[bytes, ...] = ()

    def row(self) -> dict[str, Any]:
        """The document as a row of ``SCHEMA``."""
        return {**vars(self), "scores": list(self.scores.items())}

    def size(self) -> int:
        """Characters and bytes, for the bound on a row group."""
        return len(self.text) + sum(map(len, self.images))


@dataclass(frozen=True)
class Skip:
    """Something in the corpus that gives no document: a file or a record, and why."""

    id: str
    source: str
    reason: str
    detail: str = ""


class RowWriter:
    """Buffers rows and writes them as row groups of bounded size."""

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema) -> None:
        self.writer, self.schema = writer, schema
        self.rows: list[dict[str, Any]] = []
        self.chars = 0
        self.count = 0

    def add(self, row: dict[str, Any], chars: int = 0) -> None:
        """Appends one row; ``chars`` is its size for the bound on a row group."""
        self.rows.append(row)
        self.chars += chars
        self.count += 1
        if len(self.rows) >= BATCH_ROWS or self.chars >= BATCH_CHARS:
            self.flush()

    def flush(self) -> None:
        """Writes what is buffered."""
        if self.rows:
            self.writer.write_table(pa.Table.from_pylist(self.rows, schema=self.schema))
        self.rows, self.chars = [], 0


@contextmanager
def parquet_writer(path: str | Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet file that appears complete at exit or not at all. Raises as ``atomic_path`` does."""
    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as file,
        pq.ParquetWriter(file, schema, compression="zstd", compression_level=1) as writer,
    ):
        yield writer


@contextmanager
def row_writer(path: str | Path, schema: pa.Schema) -> Iterator[RowWriter]:
    """``parquet_writer`` for single rows."""
    with parquet_writer(path, schema) as writer:
        rows = RowWriter(writer, schema)
        yield rows
        rows.flush()


def read_batches(path: str | Path, columns: list[str] | None, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """Batches of a stage's own Parquet file. Raises DataError when it is damaged."""
    try:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=rows, columns=columns)
    except (OSError, pa.ArrowException) as error:
        rule = "a finished stage's files are whole"
        raise DataError(str(path), str(error)[:200], rule, "set data.overwrite=true to make the stage again") from error


def read_texts(path: str | Path) -> Iterator[str]:
    """The texts of a Parquet file of documents, one at a time."""
    for batch in read_batches(path, ["text"], rows=64):
        yield from batch.column(0).to_pylist()


def read_columns(path: str | Path, columns: list[str] | None = None) -> pa.Table:
    """Whole columns (all: None) of a Parquet file, in memory. Raises DataError when it is damaged."""
    batches: Iterable[pa.RecordBatch] = list(read_batches(path, columns, rows=65536))
    if batches:
        return pa.Table.from_batches(batches)
    schema = pq.read_schema(path)
    return pa.schema([schema.field(name) for name in columns or schema.names]).empty_table()

"""Annotators: expensive looks at documents, stored as columns beside them.

An annotator is a frozen dataclass in a file of its own below ``data/steps``. Its fields are its settings (JSON-like);
together with ``NAME``, ``VERSION`` and the content of the files among its settings they make the fingerprint. The
columns of one part of documents are one unit of work, so that a new or changed annotator, or a changed part, costs that
and no more; thresholds are no settings: they decide later, over the columns (data/decide.py).
"""

import dataclasses
import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pyarrow as pa

from conf.errors import DataError
from data.documents import SCHEMA, parquet_writer, read_batches
from data.fence import working
from data.files import canonical_json, digest_json, file_digest
from data.stages import KEY_DIGITS, Unit, finish_unit, finished_unit, record_files

NO_TEXT = ["id", "url", "source", "metadata"]
View = TypeVar("View")


class Documents:
    """A batch of documents, with the views of their texts (words, lines) that several annotators share."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = batch
        self.ids: list[str] = batch["id"].to_pylist()
        self.texts: list[str] = batch["text"].to_pylist()
        self._views: dict[Any, Any] = {}

    @classmethod
    def of(cls, texts: Sequence[str]) -> "Documents":
        """A batch of bare texts."""
        rows = [{"id": str(row), "text": text, "url": ""} for row, text in enumerate(texts)]
        return cls(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))

    def __len__(self) -> int:
        return len(self.texts)

    def column(self, name: str) -> list[Any]:
        """A column of ``SCHEMA`` as a list."""
        return self.batch[name].to_pylist()

    def view(self, make: Callable[[list[str]], View]) -> View:
        """``make(texts)``, made once for all annotators that ask for it."""
        if make not in self._views:
            self._views[make] = make(self.texts)
        return self._views[make]


@dataclasses.dataclass(frozen=True)
class Annotator(ABC):
    """Base of annotators. Raise ``VERSION`` when the same settings give other columns."""

    NAME: ClassVar[str]
    VERSION: ClassVar[int]
    SCHEMA: ClassVar[pa.Schema]  # of the columns
    FILES: ClassVar[tuple[str, ...]] = ()  # settings that are paths ("": none): content decides, not the name

    @abstractmethod
    def columns(self, documents: Documents) -> Mapping[str, Any]:
        """A list or array a column of ``SCHEMA``, one entry a document; how documents are batched changes nothing."""

    def fingerprint(self) -> str:
        """Digest of all that decides the columns of a text. Raises DataError when a file cannot be read."""
        settings = dataclasses.asdict(self)
        settings |= {name: path_digest(settings[name]) for name in self.FILES if settings[name]}
        return digest_json([self.NAME, self.VERSION, settings])


def listed_files(path: str | Path) -> list[Path]:
    """A file, or the visible files of a folder in order. Raises DataError when there is none."""
    path = Path(path).expanduser()
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
    if not found:
        raise DataError(str(path), "not there", "a file, or a folder that holds files", "check the path")
    return found


def path_digest(path: str | Path) -> str:
    """Digest of the content of a file or of the files of a folder."""
    return digest_json([file_digest(file) for file in listed_files(path)])


def describe(annotator: Annotator) -> dict[str, Any]:
    """An annotator as a unit carries it: JSON-like, its columns' folder named by its fingerprint."""
    kind = type(annotator)
    fingerprint = annotator.fingerprint()
    return {
        "kind": f"{kind.__module__}:{kind.__qualname__}",
        "settings": dataclasses.asdict(annotator),
        "annotator": fingerprint,
        "columns": f"{annotator.NAME}-{fingerprint[:12]}",
    }


@lru_cache(maxsize=16)
def _load(kind: str, settings: str, fingerprint: str) -> Annotator:
    """The annotator of a unit; a process keeps it, and with it the model that it loads on first use."""
    del fingerprint  # a file with other content at the same path is another annotator
    module, _, name = kind.partition(":")
    return getattr(importlib.import_module(module), name)(**json.loads(settings))


def column_file(columns: str, part: dict[str, Any]) -> str:
    """Where the columns of a part are, below the folder of all columns: parts of equal content share them."""
    return f"{columns}/{part['sha256'][:KEY_DIGITS]}.parquet"


def annotate_unit(work: Unit) -> Unit:
    """Writes the columns of one part that are not there yet; all annotators look at the same batches."""
    steps: list[Unit] = work["steps"]
    with working(steps[0]):
        return _annotate(work["part"], steps)


def _annotate(part: str, steps: list[Unit]) -> Unit:
    done = [finished_unit(step) for step in steps]
    waiting = [step for step, result in zip(steps, done, strict=True) if result is None]
    if waiting:
        annotators = [_load(s["kind"], canonical_json(s["settings"]), s["annotator"]) for s in waiting]
        with ExitStack() as stack:
            paths = [Path(step["folder"]) / step["file"] for step in waiting]
            writers = [
                stack.enter_context(parquet_writer(path, annotator.SCHEMA))
                for path, annotator in zip(paths, annotators, strict=True)
            ]
            for batch in read_batches(part, ["text", *NO_TEXT]):
                documents = Documents(batch)
                for annotator, writer in zip(annotators, writers, strict=True):
                    writer.write_table(_table(annotator, documents))
    results = [
        finish_unit(step, {"files": record_files(step["folder"], [step["file"]])}) if result is None else result
        for step, result in zip(steps, done, strict=True)
    ]
    return {"files": {name: record for result in results for name, record in result["files"].items()}}


def _table(annotator: Annotator, documents: Documents) -> pa.Table:
    columns = annotator.columns(documents)
    arrays = [pa.array(columns[field.name], type=field.type) for field in annotator.SCHEMA]
    return pa.Table.from_arrays(arrays, schema=annotator.SCHEMA)


def lines_of(path: str | Path) -> Iterator[str]:
    """Entries of a list file or of a folder of them: lines without white space around, comments and empty ones out."""
    for file in listed_files(path):
        try:
            with open(file, encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if entry := line.partition("#")[0].strip():
                        yield entry
        except OSError as error:
            raise DataError(str(file), error.strerror or "", "the list can be read", "check the path") from error

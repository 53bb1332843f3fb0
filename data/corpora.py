"""Corpora: what there is to read, cut into slices that any process can read by itself."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conf.schema import DataConfig
from data import debian_docs, digit_docs, python_docs
from data.documents import Document, Skip
from data.readers import detect_format, find_files, read_file, split_parquet

SLICE_BYTES = 32 << 20  # of the small files that share a slice
NAMES_PER_CUT = 16  # of this many names, one ends a half full slice


@dataclass(frozen=True)
class Slice:
    """A unit of reading (JSON-like), and what decides its documents: no absolute path is in the ``key``."""

    unit: dict[str, Any]
    key: Any


@dataclass(frozen=True)
class Corpus:
    """``slices`` are in the corpus' order; ``inputs`` identifies the content."""

    licence: str
    inputs: Any
    slices: list[Slice]


def open_corpus(config: DataConfig) -> Corpus:
    """Lists the corpus that the config names. Raises DataError when it is not there."""
    match config.source:
        case "python_docs":
            units = python_docs.slices(config.shard_documents)
            slices = [Slice({"corpus": "python_docs", **unit}, python_docs.inputs([unit])) for unit in units]
            return Corpus(python_docs.LICENCE, python_docs.inputs(units), slices)
        case "digit_docs":
            units = digit_docs.slices(config.shard_documents)
            slices = [Slice({"corpus": "digit_docs", **unit}, [digit_docs.inputs(), unit]) for unit in units]
            return Corpus(digit_docs.LICENCE, digit_docs.inputs(), slices)
        case "debian_docs":
            return _of_files(config, debian_docs.LICENCE, debian_docs.files(config.path), "text")
        case _:
            return _of_files(config, "the user's", find_files(config.path), config.format)


def read_slice(unit: dict[str, Any]) -> Iterator[Document | Skip]:
    """Documents and skips of one slice, in the corpus' order."""
    if unit["corpus"] == "python_docs":
        yield from python_docs.read(unit)
        return
    if unit["corpus"] == "digit_docs":
        yield from digit_docs.read(unit)
        return
    for file in unit["files"]:
        groups = file.get("row_groups")
        fields = unit["text_field"], unit["id_field"], unit["image_field"]
        yield from read_file(file["path"], file["name"], unit["format"], *fields, groups)


def _of_files(config: DataConfig, licence: str, files: list[dict[str, Any]], form: str) -> Corpus:
    """Slices of files: neighbours share one up to ``shard_documents`` text files or SLICE_BYTES.

    A half full slice also ends before a file whose name says so: past a file that was added, the slices are the same.
    """
    groups: list[list[dict[str, Any]]] = []
    size = count = 0
    for file in _split(files, form):
        is_text = detect_format(file["name"], form) == "text"
        full = size + file["bytes"] > SLICE_BYTES or count >= config.shard_documents
        half = size > SLICE_BYTES // 2 or count > config.shard_documents // 2
        if not groups or full or (half and zlib.crc32(file["name"].encode()) % NAMES_PER_CUT == 0):
            groups.append([])
            size = count = 0
        groups[-1].append(file)
        size += file["bytes"]
        count += is_text
    shared = {"format": form, **{name: getattr(config, name) for name in ("text_field", "id_field", "image_field")}}
    slices = [Slice({"corpus": "files", **shared, "files": group}, [shared, _identity(group)]) for group in groups]
    return Corpus(licence, _identity(files), slices)


def _split(files: list[dict[str, Any]], form: str) -> Iterator[dict[str, Any]]:
    """The files, large Parquet files as ranges of row groups of about SLICE_BYTES."""
    for file in files:
        large = file["bytes"] > SLICE_BYTES and detect_format(file["name"], form) == "parquet"
        ranges = split_parquet(file["path"], SLICE_BYTES) if large else []
        if len(ranges) < 2:
            yield file
        for first, last in ranges if len(ranges) > 1 else ():
            yield {**file, "bytes": file["bytes"] // len(ranges), "row_groups": [first, last]}


def _identity(files: list[dict[str, Any]]) -> list[Any]:
    return [[file["name"], file["bytes"], file["mtime"], *file.get("row_groups", ())] for file in files]

"""Losses of a causal language model over documents, with a cache: a text is read once by a model, whatever is asked.

A document's loss is the sum of its tokens' bits, each token given only what stands before it in the same document
(after the model's start token); ``bits / characters`` is the loss of arXiv 2503.00808. Nothing separates documents
because nothing joins them: packed windows do not see each other.

The cache is a folder of Parquet files below ``{cache}/{model}-{rule}``, where ``model`` digests weights, config and
tokenizer. Rows are keyed by the text's digest. Files are only ever added, each whole, so any number of processes may
use one cache; what two of them score at the same time is stored twice, equal.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from conf.errors import DataError
from data.documents import parquet_writer, read_columns
from data.stages import Unit, record_files, unit
from inference.loss_models import Bits, LossModel, load_loss_model
from inference.windows import WindowRule, cut, pack, text_key

LOSSES = pa.schema(
    [
        ("text_key", pa.binary(16)),
        ("bits", pa.float64()),  # of all scored tokens
        ("even_bits", pa.float64()),  # of the tokens at even places: one half, for the reliability of what follows
        ("square_bits", pa.float64()),  # sum of the squares: the standard error follows
        ("tokens", pa.int64()),
        ("even_tokens", pa.int64()),
    ]
)
COLUMNS = LOSSES.names[1:]
GROUP = 512  # documents that are cut and packed together


@dataclass(frozen=True)
class DocumentLosses:
    """Sums over the scored tokens of each document, [documents] each; NaN bits where no token was scored."""

    bits: Bits
    even_bits: Bits
    square_bits: Bits
    tokens: Bits
    even_tokens: Bits


def score_texts(model: LossModel, texts: Sequence[str], rule: WindowRule, row_tokens: int = 4096) -> DocumentLosses:
    """The losses of texts. The order of the texts and ``row_tokens`` (in one pass) change nothing but rounding."""
    sums = np.zeros((len(texts), len(COLUMNS)))
    most = model.row_tokens(row_tokens)
    for first in range(0, len(texts), GROUP):
        encoded = model.encode(texts[first : first + GROUP])
        windows = [w for index, tokens in enumerate(encoded) for w in cut(first + index, tokens, model.begin, rule)]
        scored: list[Bits] = [np.empty(0)] * len(windows)
        for row in pack(windows, most):
            for index, bits in zip(row, model.bits([windows[index] for index in row]), strict=True):
                scored[index] = bits
        for window, bits in zip(windows, scored, strict=True):
            place = int(sums[window.document, 3])  # windows come in the document's order
            even = bits[place % 2 :: 2]
            sums[window.document] += (bits.sum(), even.sum(), (bits * bits).sum(), bits.size, even.size)
    sums[sums[:, 3] == 0, :3] = np.nan
    return DocumentLosses(*sums.T)


@functools.lru_cache(maxsize=1)
def resident(path: str, digest: str) -> LossModel:
    """The model of this process: units of one model follow each other, so a worker loads it once."""
    del digest  # a changed file at the same path is another model
    return load_loss_model(path)


def inspect_unit(work: Unit) -> Unit:
    """What the ladder must know of a model before it scores; a model that does not load says so and harms no other."""
    try:
        model = resident(work["model"], work["digest"])
        return {"context": model.context, "parameters": model.parameters, "failed": ""}
    except DataError as error:
        return {"context": 0, "parameters": 0, "failed": str(error)}


@unit
def losses_unit(work: Unit) -> Unit:
    """One model's losses of one sampled part, row by row of the part; what the cache knows is not scored."""
    folder, name = Path(work["folder"]), work["file"]
    rule = WindowRule(work["window"], work["stride"])
    texts = read_columns(Path(work["sample"]) / work["part"], ["text"]).column(0).to_pylist()
    keys = [text_key(text) for text in texts]
    cache = Path(work["cache"]) / f"{work['digest'][:24]}-{rule.key()}"
    known = _cached(cache, keys)
    missing = list({key: text for key, text in zip(keys, texts, strict=True) if key not in known}.items())
    if missing:
        model = resident(work["model"], work["digest"])
        found = score_texts(model, [text for _, text in missing], rule, work["row_tokens"])
        rows = pa.table([pa.array([key for key, _ in missing]), *vars(found).values()], names=LOSSES.names)
        with parquet_writer(cache / f"{work['fingerprint'][:24]}.parquet", LOSSES) as writer:
            writer.write_table(rows.cast(LOSSES))
        known |= _by_key(rows)
    rows = [dict(zip(LOSSES.names, (key, *known[key]), strict=True)) for key in keys]
    with parquet_writer(folder / name, LOSSES) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=LOSSES))
    return {"scored": len(missing), "documents": len(texts), "files": record_files(folder, [name])}


def _cached(cache: Path, keys: Sequence[bytes]) -> dict[bytes, tuple[Any, ...]]:
    """What the cache knows of these texts."""
    files = sorted(str(path) for path in cache.glob("*.parquet")) if cache.is_dir() else []
    if not files:
        return {}
    wanted = pc.field("text_key").isin(pa.array(keys, pa.binary(16)))
    try:
        return _by_key(ds.dataset(files, schema=LOSSES, format="parquet").to_table(filter=wanted))
    except (OSError, pa.ArrowException) as error:
        rule = "the loss cache holds whole files"
        raise DataError(
            str(cache), str(error)[:200], rule, "remove this folder: its losses are computed again"
        ) from error


def _by_key(table: pa.Table) -> dict[bytes, tuple[Any, ...]]:
    keys, *columns = (table.column(name).to_pylist() for name in LOSSES.names)
    return dict(zip(keys, zip(*columns, strict=True), strict=True))

"""Static embeddings: a table of token vectors, a document the weighted mean of its tokens'.

The table is the token embedding of any model folder (``model.safetensors`` and ``tokenizer.json``), or a model2vec
folder. A token of frequency p in the corpus weighs a / (a + p) (Arora et al. 2017, SIF); what all documents have in
common goes with the corpus mean. Phase 1 counts the tokens of every part, phase 2 embeds it. No torch, no graph.
"""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from conf.errors import DataError
from conf.schema import OrderConfig
from data.annotators import path_digest
from data.documents import read_texts
from data.embedders.centre import centre, raw_name
from data.files import canonical_json
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, record_files, unit

SIF = 1e-3  # a
TEXT = 20_000  # characters of a document that are looked at
TABLES = ("embeddings", "word_embeddings.weight", "embed_tokens.weight", "wte.weight")  # ends of the tensor's name
BATCH = 64
Counts = npt.NDArray[np.int64]


def settings(order: OrderConfig) -> dict[str, Any]:
    """What decides the vectors besides the documents."""
    folder = Path(order.model).expanduser()
    digests = [path_digest(folder / name) for name in ("model.safetensors", "tokenizer.json")]
    return {"embedder": "static", "model": digests}


def embed(stage: Stage, shared: Unit, parts: list[Unit], run_units: RunUnits) -> tuple[int, list[Unit]]:
    """Writes the vectors of all parts; returns their dimensions and the units' results."""
    dimensions = load_table(shared["model_folder"]).shape[1]
    counts = stage.units("tokens", [{**shared, **part} for part in parts])
    counted = run_units("order: count tokens", "data.embedders.static:count_unit", counts)
    indices = [part["index"] for part in parts]
    raws = stage.units("raw", [{**shared, **part, "parts": indices} for part in parts])
    embedded = run_units("order: embed", "data.embedders.static:raw_unit", raws)
    return dimensions, [*counted, *embedded, *centre(stage, shared, parts, run_units)]


def load_table(folder: str | Path) -> npt.NDArray[np.float32]:
    """The token vectors ``[vocabulary, dims]``. Raises DataError where the folder has none."""
    path = Path(folder) / "model.safetensors"
    try:
        with safe_open(str(path), framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.endswith(TABLES):
                    return file.get_tensor(name).astype(np.float32)
    except (OSError, SafetensorError) as error:
        raise DataError(str(path), str(error)[:200], "a safetensors file", "check order.model") from error
    raise DataError(str(path), "no token embedding", f"a tensor named *{', *'.join(TABLES)}", "another order.model")


@functools.lru_cache(maxsize=1)
def _resident(folder: str, digests: str) -> Tokenizer:
    """The tokenizer of this process: the library keeps what each one it has loaded remembers of words, for good."""
    del digests  # changed files at the same path are another model
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(str(path), str(error)[:200], "a tokenizers file", "check order.model") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _ids(work: Unit) -> Any:
    """The token ids of every text of a part."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one of several on the machine
    tokenizer = _resident(work["model_folder"], canonical_json(work["model"]))
    texts = [text[:TEXT] for text in read_texts(Path(work["curated"]) / work["file"])]
    for first in range(0, len(texts), BATCH):
        for found in tokenizer.encode_batch(texts[first : first + BATCH], add_special_tokens=False):
            yield np.array(found.ids, dtype=np.int64)


def _counts_name(index: int) -> str:
    return f"tokens-{index:05d}.npy"


@unit
def count_unit(work: Unit) -> Unit:
    """How often each token is in one part."""
    name, counts = _counts_name(work["index"]), np.zeros(len(load_table(work["model_folder"])), dtype=np.int64)
    for ids in _ids(work):
        counts += np.bincount(ids[ids < len(counts)], minlength=len(counts))
    write_array(Path(work["folder"]) / name, counts)
    return {"files": record_files(work["folder"], [name])}


@unit
def raw_unit(work: Unit) -> Unit:
    """The weighted means of one part's documents; zero for one without a known token."""
    folder, name = Path(work["folder"]), raw_name(work["index"])
    counts: Counts = np.sum([np.load(folder / _counts_name(index)) for index in work["parts"]], axis=0)
    weights = (SIF / (SIF + counts / max(1, counts.sum()))).astype(np.float32)
    table = load_table(work["model_folder"])
    rows = np.zeros((work["documents"], table.shape[1]), dtype=np.float32)
    for row, ids in enumerate(_ids(work)):
        known, times = np.unique(ids[ids < len(table)], return_counts=True)
        if known.size:
            share = weights[known] * times.astype(np.float32)
            rows[row] = share @ table[known] / share.sum()
    write_array(folder / name, rows)
    return {"files": record_files(folder, [name])}

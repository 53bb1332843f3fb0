"""The one-page report of an order: how related the documents of its windows are, beside a random order.

Judged three ways: by the vectors that made the order, by others that had no part in it (hashed letters), and by what
LZMA saves on windows as a whole against their documents one by one. Windows are an even sample; a token counts as 4
bytes, as no tokenizer is needed to order.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.feature_extraction.text import HashingVectorizer

from conf.schema import RunConfig
from data import page
from data.documents import read_batches
from data.files import write_atomic
from data.manifest import Manifest, read_manifest
from data.metrics import compression_gain, neighbour_share, pair_similarity
from data.neighbours import neighbour_names
from data.order import ORDER
from data.orders import random as random_order
from data.packing import plan
from data.stages import stage_folders
from data.vectors import Vectors

TOKEN_BYTES = 4
PACKINGS = ("concat", "soft", "whole")
MOST_DOCUMENTS = 200_000  # of a corpus: all texts are read, in one process
SAMPLE_BYTES, MOST_WINDOWS = 1_000_000, 200  # that are judged
JUDGED_CHARS = 4000  # of a document, by its letters
COLUMNS = ("order", "packing", "pair", "pair, by letters", "share", "all", "compressed", "cut", "padding")
Ints = npt.NDArray[np.int64]
NOTE = (
    "pair: mean similarity of two documents of a window; share: documents with one of their nearest in their window; "
    "all: windows where every document has one; compressed: bytes that LZMA saves on windows as a whole; cut: "
    "documents in more pieces than they need."
)


def by_letters(texts: list[str]) -> npt.NDArray[np.float32]:
    """Unit vectors of texts by their runs of four letters: another look than words and their co-occurrence."""
    settings: Any = {"alternate_sign": True, "norm": None, "dtype": np.float32}
    counts: Any = HashingVectorizer(analyzer="char_wb", ngram_range=(4, 4), n_features=2048, **settings)
    rows = np.asarray(counts.transform(text[:JUDGED_CHARS] for text in texts).todense(), dtype=np.float32)
    rows = np.sign(rows) * np.log1p(np.abs(rows))
    rows -= rows.mean(axis=0)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 1e-6)


class Judge:
    """The figures of orders of one corpus."""

    def __init__(self, config: RunConfig, curated: Manifest, embedded: Manifest, ordered: Manifest) -> None:
        folders = stage_folders(config)
        self.context = config.data.context
        self.files = [folders.curated / part["file"] for part in curated.figures["parts"] if part["documents"]]
        self.firsts = np.cumsum([0, *(part["documents"] for part in curated.figures["parts"] if part["documents"])])
        self.vectors = Vectors(folders.embedded, embedded.figures["parts"])
        names = [folders.ordered / neighbour_names(n)[0] for n in range(len(ordered.files))]
        self.neighbours = np.concatenate([np.load(name) for name in names if name.is_file()])
        self.bytes = np.concatenate([[len(t.encode()) for t in self._texts(f, None)] for f in self.files])

    @staticmethod
    def _texts(file: Path, rows: Ints | None) -> list[str]:
        texts, first = [], 0
        for batch in read_batches(file, ["text"]):
            here = np.arange(first, first + batch.num_rows)
            here = here if rows is None else rows[(rows >= first) & (rows < first + batch.num_rows)]
            texts += batch.column(0).take(pa.array(here - first, pa.int64())).to_pylist()
            first += batch.num_rows
        return texts

    def texts(self, documents: Ints) -> dict[int, str]:
        """The texts of documents by number."""
        numbers, found = np.unique(documents), {}
        for part, file in enumerate(self.files):
            rows = numbers[(numbers >= self.firsts[part]) & (numbers < self.firsts[part + 1])] - self.firsts[part]
            if rows.size:
                texts = self._texts(file, rows)
                found |= dict(zip((rows + self.firsts[part]).tolist(), texts, strict=True))
        return found

    def row(self, path: Ints, packing: str) -> list[float]:
        """The figures of an order under a packing, as ``COLUMNS`` from the third on."""
        lengths = np.maximum(1, self.bytes[path] // TOKEN_BYTES)
        pieces = plan(lengths, self.context, packing)
        documents, windows = path[pieces[:, 0]], pieces[:, 3]
        share, related = neighbour_share(self.neighbours, documents, windows)
        count = int(windows[-1]) + 1
        counts = np.bincount(pieces[:, 0], minlength=len(path))
        cut, padding = float(np.mean(counts > -(-lengths // self.context))), 1 - lengths.sum() / (count * self.context)
        wanted = min(MOST_WINDOWS, max(1, SAMPLE_BYTES // (self.context * TOKEN_BYTES)))
        chosen = np.isin(windows, np.unique(np.linspace(0, count - 1, wanted).astype(np.int64)))
        documents, windows, pieces = documents[chosen], windows[chosen], pieces[chosen]
        texts = self.texts(documents)
        place = {document: row for row, document in enumerate(texts)}
        letters = by_letters(list(texts.values()))
        parts: dict[int, list[str]] = {}
        for document, window, (_, offset, tokens, _) in zip(documents.tolist(), windows.tolist(), pieces, strict=True):
            piece = texts[document].encode()[offset * TOKEN_BYTES : (offset + tokens) * TOKEN_BYTES]
            parts.setdefault(window, []).append(piece.decode("utf-8", errors="replace"))
        own = pair_similarity(self.vectors, documents, windows)
        other = pair_similarity(lambda d: letters[[place[int(x)] for x in d]], documents, windows)
        return [own, other, share, related, compression_gain(list(parts.values())), cut, padding]


def judge(config: RunConfig, ordered: Manifest) -> list[tuple[str, ...]]:
    """Rows of ``COLUMNS``: this order and a random one of the same documents, under every packing."""
    folders = stage_folders(config)
    judge = Judge(config, read_manifest(folders.curated), read_manifest(folders.embedded), ordered)
    path = np.load(folders.ordered / ORDER)
    paths = {config.order.kind: path, "random": np.sort(path)[random_order.order(len(path))]}
    rows = [(kind, packing, judge.row(order, packing)) for kind, order in paths.items() for packing in PACKINGS]
    return [(kind, packing, *(f"{value:.3f}" for value in values)) for kind, packing, values in rows]


def write_report(config: RunConfig, ordered: Manifest) -> Path:
    """Writes ``{data.dir}/order-{order.kind}.html`` from a finished order by relatedness."""
    path = stage_folders(config).curated.parent / f"order-{config.order.kind}.html"
    figures = ordered.figures
    facts = [(name.replace("_", " "), f"{value:,}") for name, value in figures.items()]
    body = page.tiles(facts) + page.sections(
        [("Windows", f"<p>{NOTE}</p>" + page.table(judge(config, ordered), COLUMNS))]
    )
    subtitle = f"windows of {config.data.context:,} tokens; fingerprint {ordered.fingerprint[:16]}, {ordered.created}"
    write_atomic(path, page.page(f"Order: {config.order.kind}", subtitle, body))
    return path

"""How related the documents of a window are, for every order and packing of a run's corpus.

    python -m benchmarks.windows runs/data/python_docs [--context 8192] [--k 20]

The folder is a run's ``data.dir`` after ``sundog order``. Columns: mean similarity of consecutive documents; of two
documents of a window; documents with one of their ``k`` nearest in their window; windows where all have one; what
compressing windows as a whole saves over compressing their documents one by one, which no embedding judges; documents
cut in more pieces than they need; padding. A token counts as 4 bytes; similarity is that of the embedding that made the
orders.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.documents import read_texts
from data.manifest import read_manifest
from data.metrics import adjacent_similarity, compression_gain, neighbour_share, pair_similarity
from data.neighbours import nearest
from data.orders import ORDERS
from data.orders.graph import Lists
from data.packing import plan
from data.vectors import Vectors

PACKINGS = ("concat", "soft", "whole")
TOKEN_BYTES = 4
COMPRESSED = 400  # windows at most, evenly spread, that are compressed


def measure(
    path: npt.NDArray[np.int64], packing: str, context: int, texts: list[bytes], vectors: Vectors, ids: npt.NDArray[Any]
) -> list[float]:
    """The figures of an order under a packing, without the similarity of consecutive documents."""
    lengths = np.array([max(1, len(texts[document]) // TOKEN_BYTES) for document in path])
    pieces = plan(lengths, context, packing)
    documents, windows = path[pieces[:, 0]], pieces[:, 3]
    share, related = neighbour_share(ids, documents, windows)
    chosen = np.unique(np.linspace(0, windows[-1], COMPRESSED).astype(np.int64))
    parts = [[_piece(texts[path[row[0]]], *row[1:3]) for row in pieces[windows == window]] for window in chosen]
    cut = float(np.mean(np.bincount(pieces[:, 0]) > -(-lengths // context)))
    padding = 1 - lengths.sum() / ((windows[-1] + 1) * context)
    return [pair_similarity(vectors, documents, windows), share, related, compression_gain(parts), cut, padding]


def _piece(text: bytes, offset: int, tokens: int) -> str:
    return text[offset * TOKEN_BYTES : (offset + tokens) * TOKEN_BYTES].decode(errors="replace")


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--k", type=int, default=20)
    arguments = parser.parse_args()
    curated, embedded = (read_manifest(arguments.folder / name) for name in ("curated", "embedded"))
    files = [arguments.folder / "curated" / part["file"] for part in curated.figures["parts"] if part["documents"]]
    texts = [text.encode() for file in files for text in read_texts(file)]
    vectors = Vectors(arguments.folder / "embedded", embedded.figures["parts"])
    ids, similarities = nearest(vectors(np.arange(len(vectors))), 0, len(vectors), arguments.k)
    size = sum(map(len, texts))
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB, windows of {arguments.context:,} tokens, k={arguments.k}")
    columns = ("adjacent", "pair", "share", "all", "compressed", "cut", "padding")
    print(f"{'order':11s} {'packing':8s}" + "".join(f"{name:>11s}" for name in columns))
    for kind, order in ORDERS.items():
        path = order(Lists([(ids, similarities)]), vectors).astype(np.int64)
        adjacent = adjacent_similarity(vectors, path)
        for packing in PACKINGS:
            found = [adjacent, *measure(path, packing, arguments.context, texts, vectors, ids)]
            print(f"{kind:11s} {packing:8s}" + "".join(f"{value:11.3f}" for value in found))


if __name__ == "__main__":
    main()

"""How related the documents of a window are, for every order and packing of a run's corpus.

    python -m benchmarks.windows runs/data/python_docs [--contexts 8192 32768] [--packings concat soft whole]
        [--orders matching] [--k 20]

The folder is a run's ``data.dir`` after ``sundog order``. Columns: mean similarity of consecutive documents; of two
documents of a window; documents with one of their ``k`` nearest in their window; windows where all have one; the same
four by an embedding that had no part in the orders (hashed runs of four letters); what compressing windows as a whole
saves over compressing their documents one by one, which no embedding judges; documents cut in more pieces than they
need; padding. A token counts as 4 bytes. ``unmoved`` is a control, not a packing of ours: a window ends before the
first document that it cannot hold, so nothing is moved or cut and much is padded.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.documents import read_texts
from data.manifest import read_manifest
from data.metrics import adjacent_similarity, compression_gain, neighbour_share, pair_similarity
from data.neighbours import nearest
from data.order_report import by_letters
from data.orders import ORDERS
from data.orders.graph import Lists
from data.packing import plan
from data.vectors import Vectors

CONTROL = "unmoved"
PACKINGS = ("concat", "soft", "whole", CONTROL)
TOKEN_BYTES = 4
COMPRESSED = 400
JUDGED = ("adjac.", "pair", "share", "all")
COLUMNS = (*JUDGED, *(f"{name}'" for name in JUDGED), "compr.", "cut", "pad")
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Judge:
    """Vectors of all documents, and each one's nearest by them."""

    vectors: Callable[[Any], Any]
    nearest: npt.NDArray[Any]

    def figures(self, path: Ints, documents: Ints, windows: Ints) -> list[float]:
        """Similarity of consecutive documents of ``path`` and of two of a window, share and all."""
        adjacent = adjacent_similarity(self.vectors, path)
        return [
            adjacent,
            pair_similarity(self.vectors, documents, windows),
            *neighbour_share(self.nearest, documents, windows),
        ]


def unmoved(lengths: Ints, context: int) -> Ints:
    """Pieces as ``data.packing.plan`` gives them, of documents in order, each begun in a new window if it must."""
    pieces, window, room = [], 0, context
    for document, length in enumerate(lengths.tolist()):
        if room < min(length, context):
            window, room = window + 1, context
        for offset in range(0, length, context):  # longer ones begin a window
            take = min(context, length - offset)
            if take > room:
                window, room = window + 1, context
            pieces.append((document, offset, take, window))
            room -= take
    return np.array(pieces)


def measure(
    path: Ints, packing: str, context: int, texts: list[bytes], judges: Sequence[Judge], compressed: int
) -> list[float]:
    """The figures of an order under a packing; of ``compressed`` windows, evenly spread, the compression."""
    lengths = np.array([max(1, len(texts[document]) // TOKEN_BYTES) for document in path])
    pieces = unmoved(lengths, context) if packing == CONTROL else plan(lengths, context, packing)
    documents, windows = path[pieces[:, 0]], pieces[:, 3]
    chosen = np.unique(np.linspace(0, windows[-1], compressed).astype(np.int64))
    parts = [[_piece(texts[path[row[0]]], *row[1:3]) for row in pieces[windows == window]] for window in chosen]
    cut = float(np.mean(np.bincount(pieces[:, 0]) > -(-lengths // context)))
    padding = 1 - lengths.sum() / ((windows[-1] + 1) * context)
    judged = [figure for judge in judges for figure in judge.figures(path, documents, windows)]
    return [*judged, compression_gain(parts), cut, padding]


def _piece(text: bytes, offset: int, tokens: int) -> str:
    return text[offset * TOKEN_BYTES : (offset + tokens) * TOKEN_BYTES].decode(errors="replace")


def main() -> None:
    """Runs the comparison and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192])
    parser.add_argument("--packings", nargs="+", choices=PACKINGS, default=list(PACKINGS))
    parser.add_argument("--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS))
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--compressed", type=int, default=COMPRESSED, help="windows that are compressed")
    arguments = parser.parse_args()
    curated, embedded = (read_manifest(arguments.folder / name) for name in ("curated", "embedded"))
    files = [arguments.folder / "curated" / part["file"] for part in curated.figures["parts"] if part["documents"]]
    texts = [text for file in files for text in read_texts(file)]
    own = Vectors(arguments.folder / "embedded", embedded.figures["parts"])
    letters = by_letters(texts)
    ids, similarities = nearest(own(np.arange(len(own))), 0, len(own), arguments.k)
    judges = [Judge(own, ids), Judge(letters.__getitem__, nearest(letters, 0, len(letters), arguments.k)[0])]
    content = [text.encode() for text in texts]
    print(f"{len(texts):,} documents, {sum(map(len, content)) / 1e6:.1f} MB, k={arguments.k}")
    print(f"{'order':11s}{'packing':8s}{'window':>7s}" + "".join(f"{name:>8s}" for name in COLUMNS))
    for kind in arguments.orders:
        path = ORDERS[kind](Lists([(ids, similarities)]), own).astype(np.int64)
        for context in arguments.contexts:
            for packing in arguments.packings:
                found = measure(path, packing, context, content, judges, arguments.compressed)
                print(f"{kind:11s}{packing:8s}{context:7d}" + "".join(f"{value:8.3f}" for value in found))


if __name__ == "__main__":
    main()

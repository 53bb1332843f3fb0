"""Exact k nearest neighbours by cosine, with ties in a fixed order."""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import numpy.typing as npt

from data.embed import load_vectors
from data.shards import write_array
from data.stages import Unit, record_files, unit

MISSING = -1  # id where a document has fewer than k neighbours
SLACK = 8  # candidates beyond k: room for equal similarities at the border
DECIMALS = 6  # of a similarity: float32 sums that differ in their last bits only are equal
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


def nearest(vectors: Floats, first: int, last: int, k: int) -> tuple[Ints, Floats]:
    """The ``k`` nearest rows of ``vectors`` (unit length) to each of the rows ``first:last``, without itself.

    Returns ids int64 and similarities float32, both ``[last - first, k]``, by similarity descending, then id ascending;
    -1 and 0 where there are fewer than ``k`` other rows.
    """
    documents = len(vectors)
    ids = np.full((last - first, k), MISSING, dtype=np.int64)
    similarities = np.zeros((last - first, k), dtype=np.float32)
    wanted = min(k, documents - 1)
    if wanted < 1 or first >= last:
        return ids, similarities
    index: Any = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))
    pending, fetch = np.arange(first, last), min(documents, wanted + 1 + SLACK)
    while pending.size:
        found_similarities, found = index.search(np.ascontiguousarray(vectors[pending]), fetch)
        scores = np.round(found_similarities.astype(np.float64), DECIMALS)
        scores[found == pending[:, None]] = -np.inf  # itself comes last
        rows = np.arange(len(pending))[:, None]
        order = np.lexsort((found, -scores), axis=1)
        found, scores = found[rows, order], scores[rows, order]
        # Equal similarities may go on beyond what was fetched, with smaller ids: such rows fetch more.
        others = fetch - (scores[:, -1] == -np.inf)
        border = scores[np.arange(len(pending)), others - 1]
        done = (scores[:, wanted - 1] > border) | (fetch == documents)
        ids[pending[done] - first, :wanted] = found[done, :wanted]
        similarities[pending[done] - first, :wanted] = scores[done, :wanted]
        pending, fetch = pending[~done], min(documents, 2 * fetch)
    return ids, similarities


def neighbour_names(index: int) -> tuple[str, str]:
    """Files of one range of documents: ids and similarities."""
    return f"neighbours-{index:05d}.npy", f"similarities-{index:05d}.npy"


@unit
def neighbours_unit(work: Unit) -> Unit:
    """Neighbours of the documents ``first:last``."""
    faiss.omp_set_num_threads(1)  # a worker is one of several on the machine
    vectors = load_vectors(work["embedded"], work["parts"])
    arrays = nearest(vectors, work["first"], work["last"], work["k"])
    names = neighbour_names(work["index"])
    for name, array in zip(names, arrays, strict=True):
        write_array(Path(work["folder"]) / name, array)
    return {"files": record_files(work["folder"], names)}

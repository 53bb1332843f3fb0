"""Matching in partitions: each partition's documents are matched by a unit of their own, borders by all together.

A partition is a region of the vectors (k-means). Only fragments of up to eight documents are made inside one, so what
a border cuts is mended by the steps that follow, which know no partitions: fragments are matched by their mean vectors
and every document that is left without its nearest is put beside them. Memory of a unit: its partition's graph.
"""

from collections.abc import Callable
from typing import Any

import faiss
import numpy as np

from data.orders.graph import Array, Lists, build_graph
from data.orders.matching import match_documents

SAMPLE = 256  # vectors a partition that the centroids are trained on
ROWS = 16_384  # vectors at once


def assign(documents: int, vectors: Callable[[Array], Array], partitions: int) -> Array:
    """The partition of every document, int32 ``[documents]``."""
    sample = vectors(np.arange(0, documents, max(1, documents // (SAMPLE * partitions))))
    means: Any = faiss.Kmeans(
        sample.shape[1], partitions, niter=10, seed=0, spherical=True, min_points_per_centroid=1, verbose=False
    )
    means.train(sample)
    found = [means.assign(vectors(np.arange(i, min(i + ROWS, documents))))[1] for i in range(0, documents, ROWS)]
    return np.concatenate(found).astype(np.int32)


def match_partition(lists: Lists, members: Array) -> tuple[Array, Array]:
    """Fragments of the documents ``members`` (ascending), by edges between them: documents, and bounds."""
    path, bounds = match_documents(build_graph(_restrict(lists, members)))
    return members[path].astype(np.int32), bounds


def _restrict(lists: Lists, members: Array) -> Lists:
    """The lists of some documents, numbered by their place in ``members``; others are missing."""
    start, parts = 0, []
    for ids, similarities in lists:
        own = members[np.searchsorted(members, start) : np.searchsorted(members, start + len(ids))] - start
        start += len(ids)
        if own.size:
            rows = np.asarray(ids[own])
            place = np.minimum(np.searchsorted(members, rows), len(members) - 1)
            parts.append((np.where(members[place] == rows, place, -1).astype(np.int32), np.asarray(similarities[own])))
    return Lists(parts)

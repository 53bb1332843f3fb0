"""Near duplicates among neighbours: proposed by similarity, decided by the share of word 5-grams.

Similarity alone is no judge: documents under one licence header or made from one template have nearly equal vectors.
So pairs of neighbours with a cosine of at least 0.9 are proposed, and their Jaccard similarity is measured on bottom-k
sketches of the hashed 5-grams (Broder 1997): exact for documents of up to 256 distinct 5-grams, else with a standard
error of at most 0.03. Longer documents are kept first; a document goes if it is a near duplicate of one that is kept,
so no document goes because of a chain of others.

Of many copies each knows some: of a million each its k nearest. So documents whose sketches begin alike are proposed
as well, and what verified pairs connect is looked at together: the longest document of each component is compared with
all others, then the longest of those that are left, and so on.
"""

import re
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numba
import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.documents import read_texts
from data.manifest import Manifest
from data.near import distinct_pairs
from data.neighbours import neighbour_names
from data.permutation import mix
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, record_files, unit

PROPOSE = 0.9  # cosine of two neighbours that are looked at
SHINGLE = 5  # words
SKETCH = 256  # smallest hashes that are kept
BEGINNINGS = 4  # of these, by each of which documents are proposed: a pair of Jaccard similarity s shares each with s
ROUNDS = 32  # documents of a component that all others are compared with, at most; then proposed pairs decide
Hashes = npt.NDArray[np.uint64]
WORD = re.compile(r"\w+")


def find_duplicates(
    stage: Stage, curated: Manifest, folder: str, shared: Unit, threshold: float, run_units: RunUnits
) -> list[Unit]:
    """Writes ``duplicates.npy``, bool ``[documents]``: who is left out; no unit at all where ``threshold`` is 0."""
    if threshold == 0:
        return []
    proposed = run_units("order: propose", "data.near_duplicates:propose_unit", stage.units("propose", [shared]))
    if not proposed[0]["pairs"]:
        return []
    start, work = 0, []
    for index, part in enumerate(curated.figures["parts"]):
        work.append({"index": index, "first": start, "curated": folder, **part})
        start += part["documents"]
    sketched = run_units("order: sketch", "data.near_duplicates:sketch_unit", stage.units("sketch", work))
    decide = stage.units("decide", [{"parts": len(work), "documents": start, "threshold": threshold}])
    decided = run_units("order: near duplicates", "data.near_duplicates:decide_unit", decide)
    return [*proposed, *sketched, *decided]


@unit
def propose_unit(work: Unit) -> Unit:
    """Pairs of neighbours that are similar enough to be looked at, int64 ``[pairs, 2]``, each once; their documents."""
    folder = Path(work["folder"])
    unique = distinct_pairs(_proposed(folder, work["ranges"]))
    write_array(folder / "pairs.npy", unique)
    write_array(folder / "candidates.npy", np.unique(unique))
    return {"pairs": len(unique), "files": record_files(folder, ["pairs.npy", "candidates.npy"])}


def _proposed(folder: Path, ranges: int) -> Iterator[npt.NDArray[np.int64]]:
    first = 0
    for number in range(ranges):
        ids, similarities = (np.load(folder / name, mmap_mode="r") for name in neighbour_names(number))
        rows, columns = np.nonzero((np.asarray(similarities) >= PROPOSE) & (np.asarray(ids) >= 0))
        found = np.stack([rows + first, ids[rows, columns]], axis=1).astype(np.int64)
        yield np.sort(found, axis=1)
        first += len(ids)


@unit
def sketch_unit(work: Unit) -> Unit:
    """Sketches ``[documents, SKETCH]`` and lengths in characters of those documents of a part that are proposed."""
    folder, names = Path(work["folder"]), sketch_names(work["index"])
    candidates = np.load(folder / "candidates.npy", mmap_mode="r")
    begin, end = np.searchsorted(candidates, [work["first"], work["first"] + work["documents"]])
    wanted = np.array(candidates[begin:end])
    chosen, rows, lengths = set((wanted - work["first"]).tolist()), [], []
    for row, text in enumerate(read_texts(Path(work["curated"]) / work["file"]) if chosen else ()):
        if row in chosen:
            rows.append(sketch(text))
            lengths.append(len(text))
    write_array(folder / names[0], np.array(rows, dtype=np.uint64).reshape(-1, SKETCH))
    write_array(folder / names[1], np.stack([wanted, np.array(lengths, dtype=np.int64)], axis=1))
    return {"files": record_files(folder, names)}


@unit
def decide_unit(work: Unit) -> Unit:
    """Which documents are left out."""
    folder, names = Path(work["folder"]), [sketch_names(index) for index in range(work["parts"])]
    tables = [np.load(folder / name) for _, name in names]
    table, ends = np.concatenate(tables), np.cumsum([0, *map(len, tables)])
    pairs = np.searchsorted(table[:, 0], np.load(folder / "pairs.npy"))
    with tempfile.TemporaryFile(dir=folder) as file:  # 2 KB a candidate, which the system may take from memory
        sketches = np.memmap(file, np.uint64, "w+", shape=(len(table), SKETCH))
        for (name, _), first, last in zip(names, ends[:-1], ends[1:], strict=True):
            sketches[first:last] = np.load(folder / name)
        pairs = distinct_pairs([pairs, *(_begin_alike(sketches[:, place]) for place in range(BEGINNINGS))])
        verified = pairs[jaccard(sketches, pairs) >= work["threshold"]]
        gone = redundant_in_components(sketches, verified, table[:, 1], work["threshold"])
    dropped = np.zeros(work["documents"], dtype=bool)
    dropped[table[gone, 0]] = True
    write_array(folder / "duplicates.npy", dropped)
    return {"verified": len(verified), "files": record_files(folder, ["duplicates.npy"])}


def _begin_alike(hashes: Hashes) -> npt.NDArray[np.int64]:
    """Each row with the next one of the same hash."""
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    return np.stack([order[same], order[same + 1]], axis=1)


def sketch_names(index: int) -> tuple[str, str]:
    """Files of one part: sketches, and rows (document, characters)."""
    return f"sketches-{index:05d}.npy", f"sketched-{index:05d}.npy"


def sketch(text: str) -> Hashes:
    """The smallest SKETCH hashes of the text's word 5-grams, ascending, filled with 2^64 - 1."""
    words: dict[str, int] = {}
    numbers = np.array([words.setdefault(w, zlib.crc32(w.encode())) for w in WORD.findall(text.casefold())], np.uint64)
    count = max(len(numbers) - SHINGLE + 1, min(len(numbers), 1))
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(min(SHINGLE, len(numbers))):
        hashes = mix(hashes + numbers[place : place + count] + np.uint64(0x9E3779B97F4A7C15))
    smallest = np.unique(hashes)[:SKETCH]
    return np.pad(smallest, (0, SKETCH - len(smallest)), constant_values=np.uint64(2**64 - 1))


@numba.njit(cache=True)
def jaccard(sketches: Hashes, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity of each pair of rows: the share, of the union's smallest hashes, that both have."""
    width, end = sketches.shape[1], np.uint64(2**64 - 1)
    result = np.zeros(len(pairs))
    for pair in range(len(pairs)):
        left, right = sketches[pairs[pair, 0]], sketches[pairs[pair, 1]]
        i, j, both, union = 0, 0, 0, 0
        while union < width:
            a = left[i] if i < width else end
            b = right[j] if j < width else end
            if a == end and b == end:
                break
            union += 1
            both += a == b
            if a <= b:
                i += 1
            if b <= a:
                j += 1
        result[pair] = both / union if union else 1.0
    return result


def redundant_in_components(
    sketches: Hashes, verified: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], threshold: float
) -> npt.NDArray[np.int64]:
    """Who goes, ascending: of each component of the verified pairs all that are like one that is kept."""
    rows = len(lengths)
    graph = coo_array((np.ones(len(verified), dtype=np.int8), (verified[:, 0], verified[:, 1])), shape=(rows, rows))
    label = connected_components(graph, directed=False)[1]
    order = np.lexsort((np.arange(rows), -lengths, label))  # each component's longest first, then its lowest
    left, gone = order[np.bincount(label)[label[order]] > 1], np.zeros(rows, dtype=bool)
    for _ in range(ROUNDS):
        leads = np.diff(label[left], prepend=-1) != 0
        leader = left[leads][np.cumsum(leads) - 1]
        gone[left] |= (jaccard(sketches, np.stack([leader, left], axis=1)) >= threshold) & ~leads
        left = left[~leads & ~gone[left]]
    among = np.isin(verified, left).all(axis=1)
    gone[redundant(verified[among], lengths)] = True
    return np.flatnonzero(gone)


def redundant(pairs: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Who goes: from the longest (then lowest) document on, each one with a near duplicate that is kept."""
    order = np.argsort(-lengths, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    ranks = np.sort(rank[pairs], axis=1)
    ranks = ranks[np.argsort(ranks[:, 1], kind="stable")]
    bounds = np.searchsorted(ranks[:, 1], np.arange(len(order) + 1))
    return np.sort(order[_gone(ranks[:, 0].copy(), bounds)])


@numba.njit(cache=True)
def _gone(earlier: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """By rank, whether one of the earlier partners ``earlier[bounds[rank]:bounds[rank + 1]]`` stays."""
    gone = np.zeros(len(bounds) - 1, dtype=np.bool_)
    for rank in range(len(gone)):
        for place in range(bounds[rank], bounds[rank + 1]):
            gone[rank] |= earlier[place] != rank and not gone[earlier[place]]
    return gone

"""Near duplicates over the whole corpus: band keys propose pairs, the exact Jaccard similarity decides, and of every
connected component of similar documents the first in corpus order stays.

1. Each unit takes one range of the keys of one band (``curation.bucket_documents`` of them in memory) and proposes
   pairs: every document with the first and with the one before of those that share its key.
2. Proposals are made distinct, and the documents in them get their shingles written, part by part.
3. Pairs are compared; those of at least ``min_jaccard`` are edges.
4. Components of the edges: memory grows with the near duplicates, not with the corpus.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from data.decide import Deciding, config_of, survivors, write_drops
from data.documents import read_batches
from data.files import read_json
from data.shards import write_array
from data.stages import Unit, record_files, unit
from data.steps.minhash import band_names, shingles

PAIRS = 200_000  # that one unit compares
GATHERED = 2**20  # proposed pairs that wait, at least, before equal ones are made one
REASON = "near_duplicate"
Ints = npt.NDArray[np.int64]


def drop_near_duplicates(deciding: Deciding) -> dict[str, int]:
    """Drops all but the first of each component; returns how many pairs were proposed and how many are similar."""
    minhash, buckets = deciding.curation.minhash, deciding.buckets
    work: list[Unit] = [
        {"band": name, "bucket": bucket, "buckets": buckets}
        for name in band_names(minhash.bands)
        for bucket in range(buckets)
    ]
    proposed = deciding.units("near propose", "data.near:propose_unit", work)
    pairs = deciding.units("near pairs", "data.near:pairs_unit", [{"proposed": [r["pairs"] for r in proposed]}])[0]
    if not pairs["count"]:
        return {"proposed": 0, "similar": 0}
    parts: list[dict[str, Any]] = read_json(deciding.stage.folder / "plan.json")
    documents = str(deciding.stage.folder.parent / "documents")
    work = [{"part": part, "candidates": pairs["candidates"]} for part in parts]
    with_source = [{**unit, "documents": documents} for unit in work]
    shingled = deciding.units("near shingles", "data.near:shingles_unit", with_source, keys=work)
    names = [result["shingles"] for result in shingled]
    firsts = [part["first"] for part in parts]
    work = [
        {"pairs": pairs["pairs"], "range": [first, first + PAIRS], "shingles": names, "firsts": firsts}
        for first in range(0, pairs["count"], PAIRS)
    ]
    compared = deciding.units("near compare", "data.near:compare_unit", work)
    edges = [{"edges": [result["edges"] for result in compared], "reason": REASON}]
    dropped = deciding.units("near components", "data.near:components_unit", edges)[0]
    deciding.drops.append({"reason": REASON, "file": dropped["drops"]})
    return {"proposed": pairs["count"], "similar": sum(result["count"] for result in compared)}


@unit
def propose_unit(work: Unit) -> Unit:
    """Pairs of documents that share a key of one band, ``int64 [pairs, 2]``, the lower number first."""
    numbers, keys = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for found, table in survivors(work, "minhash", [work["band"]]):
        column = table.column(work["band"])
        valid = column.is_valid().to_numpy()
        values = column.fill_null(0).to_numpy().astype(np.uint64)
        mine = valid & (values % np.uint64(work["buckets"]) == work["bucket"])
        numbers.append(found[mine])
        keys.append(values[mine])
    return _write(work, "proposed", _neighbours(np.concatenate(numbers), np.concatenate(keys)))


def _neighbours(numbers: Ints, keys: npt.NDArray[np.uint64]) -> Ints:
    """Pairs of each number with the first and the previous one of its key; numbers come in rising order."""
    order = np.argsort(keys, kind="stable")
    numbers, keys = numbers[order], keys[order]
    same = np.flatnonzero(keys[1:] == keys[:-1]) + 1  # rows that are not the first of their key
    begins = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if keys.size else same
    first = begins[np.searchsorted(begins, same, side="right") - 1]
    pairs = [np.stack([numbers[other], numbers[same]], axis=1) for other in (first, same - 1)]
    return distinct_pairs(pairs)


def distinct_pairs(proposed: Iterable[Ints]) -> Ints:
    """The different pairs, ascending. Copies of a page are proposed by every band, so equal ones do not pile up."""
    codes, waiting = np.zeros(0, np.uint64), [np.zeros(0, np.uint64)]
    for pairs in proposed:
        assert not pairs.size or pairs.max() < 2**32, "two document numbers fit in 64 bits"
        waiting.append(pairs[:, 0].astype(np.uint64) << np.uint64(32) | pairs[:, 1].astype(np.uint64))
        if sum(map(len, waiting)) > max(GATHERED, len(codes)):
            codes, waiting = np.unique(np.concatenate([codes, *waiting])), []
    codes = np.unique(np.concatenate([codes, *waiting]))
    return np.stack([codes >> np.uint64(32), codes & np.uint64(2**32 - 1)], axis=1).astype(np.int64)


@unit
def pairs_unit(work: Unit) -> Unit:
    """The distinct pairs of all bands, and the documents in them."""
    folder = Path(work["folder"])
    pairs = distinct_pairs(np.load(folder / name) for name in work["proposed"])
    result = _write(work, "pairs", pairs)
    name = f"near/candidates-{work['key']}.npy"
    write_array(folder / name, np.unique(pairs))
    return {**result, "candidates": name, "files": result["files"] | record_files(folder, [name])}


@unit
def shingles_unit(work: Unit) -> Unit:
    """Shingles of the candidates of one part: their numbers and offsets in one file, all shingles in another."""
    folder, part = Path(work["folder"]), work["part"]
    candidates = np.load(folder / work["candidates"], mmap_mode="r")
    begin, end = np.searchsorted(candidates, [part["first"], part["first"] + part["documents"]])
    numbers = np.array(candidates[begin:end])
    size, wanted = config_of(work["curation"]).minhash.shingle, set((numbers - part["first"]).tolist())
    sets, row = [np.zeros(0, np.uint64)], 0
    for batch in read_batches(Path(work["documents"]) / part["file"], ["text"]) if wanted else ():
        rows = [at for at in range(batch.num_rows) if row + at in wanted]
        sets += [shingles(text, size) for text in batch.column(0).take(pa.array(rows, pa.int64())).to_pylist()]
        row += batch.num_rows
    index, flat = (f"near/{kind}-{part['file'].split('/')[-1].split('.')[0]}-{work['key']}.npy" for kind in "is")
    offsets = np.cumsum([found.size for found in sets], dtype=np.int64)
    write_array(folder / index, np.concatenate([numbers, offsets]))
    write_array(folder / flat, np.concatenate(sets))
    return {"shingles": [index, flat], "files": record_files(folder, [index, flat])}


class Shingles:
    """Shingles of the candidates of all parts, read from disk as they are asked for."""

    def __init__(self, folder: Path, names: list[list[str]], firsts: list[int]) -> None:
        self.folder, self.names, self.firsts = folder, names, np.array(firsts)
        self.part, self.index, self.flat = -1, np.zeros(0, np.int64), np.zeros(0, np.uint64)

    def __getitem__(self, number: int) -> npt.NDArray[np.uint64]:
        part = int(np.searchsorted(self.firsts, number, side="right")) - 1
        if part != self.part:
            self.part = part
            self.index, self.flat = (np.load(self.folder / name, mmap_mode="r") for name in self.names[part])
        count = len(self.index) // 2
        row = int(np.searchsorted(self.index[:count], number))
        return self.flat[self.index[count + row] : self.index[count + row + 1]]


@unit
def compare_unit(work: Unit) -> Unit:
    """The pairs of one range whose shingle sets are similar enough."""
    folder, least = Path(work["folder"]), config_of(work["curation"]).minhash.min_jaccard
    pairs = np.load(folder / work["pairs"], mmap_mode="r")[slice(*work["range"])]
    left, right = (Shingles(folder, work["shingles"], work["firsts"]) for _ in range(2))
    similar = np.zeros(len(pairs), dtype=bool)
    for row, (a, b) in enumerate(pairs.tolist()):
        one, two = left[a], right[b]
        shared = np.intersect1d(one, two, assume_unique=True).size
        similar[row] = shared >= least * (one.size + two.size - shared)
    result = _write(work, "edges", np.array(pairs[similar]))
    return {"edges": result["pairs"], "count": result["count"], "files": result["files"]}


@unit
def components_unit(work: Unit) -> Unit:
    """Drops every document that an edge connects, directly or over others, with an earlier one."""
    edges = np.concatenate([np.load(Path(work["folder"]) / name) for name in work["edges"]])
    nodes, ends = np.unique(edges, return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), dtype=np.int8), (ends[:, 0], ends[:, 1])), shape=(len(nodes), len(nodes)))
    _, labels = connected_components(graph, directed=False)
    _, first = np.unique(labels, return_index=True)  # nodes are in corpus order
    return write_drops(work, np.delete(nodes, first))


def _write(work: Unit, kind: str, pairs: Ints) -> Unit:
    """Writes pairs; the result of a unit that finds some."""
    name = f"near/{kind}-{work['key']}.npy"
    write_array(Path(work["folder"]) / name, pairs)
    return {"pairs": name, "count": len(pairs), "files": record_files(work["folder"], [name])}

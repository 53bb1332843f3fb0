"""The order in which documents are packed: by relatedness (In-Context Pretraining) or at random."""

import shutil
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from conf.errors import ConfigError
from conf.schema import RunConfig
from data.embed import embed
from data.manifest import Manifest, read_manifest
from data.metrics import adjacent_similarity, jumps
from data.near_duplicates import find_duplicates
from data.neighbours import find_neighbours, index_kind, neighbour_names
from data.neighbours_cells import join_cells
from data.orders import ORDERS
from data.orders import random as random_order
from data.orders.graph import MAX_DOCUMENTS, Lists, build_graph
from data.orders.matching import join_fragments, match_documents, settle
from data.orders.partitioned import assign, match_partition
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, run_stage, stage_folders, unit
from data.vectors import Vectors

ORDER = "order.npy"  # int64 [documents]: numbers of the curated documents (parts one after another) in order
STARTS = "starts.npy"  # bool [documents]: whether a document in the order is no neighbour of the one before it
PARTITION = 250_000  # documents of one partition, where the config does not say: their graph is 40 MB


def order(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Orders the curated documents into ``{data.dir}/ordered-{order.kind}``.

    Figures: ``documents``, ``near_duplicates`` (documents left out), ``isolated`` (without any neighbour),
    ``adjacent_similarity`` (mean cosine of consecutive documents), ``random_similarity`` (the same for a random order),
    ``jumps`` (consecutive documents that are no neighbours). The random order embeds nothing: its similarities and
    jumps are None.
    """
    return at_random(config, run_units) if config.order.kind == "random" else in_context(config, run_units)


def at_random(config: RunConfig, run_units: RunUnits) -> Manifest:
    """The random order."""
    folders = stage_folders(config)
    curated = read_manifest(folders.curated, command="curate")
    stage = Stage("order", 2, folders.ordered, {"kind": "random"}, curated, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        work = stage.units("random", [{"documents": curated.figures["kept"]}])
        results = run_units("order: shuffle", "data.order:random_unit", work)
        figures = {"adjacent_similarity": None, "random_similarity": None, "jumps": None}
        return {"documents": curated.figures["kept"], **figures}, collect_files(results)

    return run_stage(stage, body)


@unit
def random_unit(work: Unit) -> Unit:
    """Writes the random order; every document starts a run of its own."""
    write_array(Path(work["folder"]) / ORDER, random_order.order(work["documents"]))
    write_array(Path(work["folder"]) / STARTS, np.ones(work["documents"], dtype=bool))
    return {"files": record_files(work["folder"], [ORDER, STARTS])}


def in_context(config: RunConfig, run_units: RunUnits) -> Manifest:
    """An order by relatedness: embeddings, the neighbour graph, near duplicates, the order."""
    folders, wish = stage_folders(config), config.order
    embedded = embed(config, run_units)
    names = ("kind", "neighbours", "index", "partitions", "near_duplicates")
    settings = {name: getattr(wish, name) for name in names}
    stage = Stage("order", 4, folders.ordered, settings, embedded, overwrite=config.data.overwrite)
    documents = embedded.figures["documents"]
    partitions = wish.partitions or (-(-documents // PARTITION) if wish.kind == "matching" else 1)
    if -(-documents // partitions) > MAX_DOCUMENTS:
        rule = f"one graph holds {MAX_DOCUMENTS} documents at most; only matching works in partitions"
        raise ConfigError("order.kind", wish.kind, rule, "order.kind=matching order.partitions=0")

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        shared = {"embedded": str(folders.embedded), "parts": embedded.figures["parts"], "k": wish.neighbours}
        kind = index_kind(wish.index, documents)
        search = join_cells if kind == "cells" else find_neighbours
        found = search(stage, {**shared, "index": kind}, documents, run_units)
        shared |= {"ranges": sum("isolated" in result for result in found), "documents": documents}
        curated = read_manifest(folders.curated, command="curate")
        duplicates = find_duplicates(stage, curated, str(folders.curated), shared, wish.near_duplicates, run_units)
        pieces = _match_partitions(stage, shared, partitions, run_units) if wish.kind == "matching" else []
        work = {**shared, "kind": wish.kind, "dropped": bool(duplicates), "pieces": partitions if pieces else 0}
        laid = run_units("order: lay out", "data.order:order_unit", stage.units("order", [work]))
        figures = {"isolated": sum(result.get("isolated", 0) for result in found), **laid[0]["figures"]}
        return figures, collect_files([*found, *duplicates, *pieces, *laid])

    return run_stage(stage, body)


def _match_partitions(stage: Stage, shared: Unit, partitions: int, run_units: RunUnits) -> list[Unit]:
    split = stage.units("partition", [{**shared, "partitions": partitions}] if partitions > 1 else [])
    assigned = run_units("order: partition", "data.order:partition_unit", split)
    shared = {**shared, "partitions": partitions}
    work = stage.units("match", [{**shared, "partition": number} for number in range(partitions)])
    return assigned + run_units("order: match", "data.order:match_unit", work)


@unit
def partition_unit(work: Unit) -> Unit:
    """Assigns every document to a partition."""
    faiss.omp_set_num_threads(1)
    vectors = Vectors(work["embedded"], work["parts"])
    write_array(Path(work["folder"]) / "partitions.npy", assign(len(vectors), vectors, work["partitions"]))
    return {"files": record_files(work["folder"], ["partitions.npy"])}


@unit
def match_unit(work: Unit) -> Unit:
    """Matches the documents of one partition."""
    folder, names, lists = Path(work["folder"]), _piece_names(work["partition"]), _lists(work)
    if work["partitions"] > 1:
        members = np.flatnonzero(np.load(folder / "partitions.npy", mmap_mode="r") == work["partition"])
        pieces = match_partition(lists, members)
    else:
        pieces = match_documents(build_graph(lists))
    for name, array in zip(names, pieces, strict=True):
        write_array(folder / name, array)
    return {"files": record_files(folder, names)}


@unit
def order_unit(work: Unit) -> Unit:
    """Orders the graph, leaves near duplicates out, writes the order and where related runs start, measures it."""
    faiss.omp_set_num_threads(1)
    folder, scratch = Path(work["folder"]), Path(work["folder"]) / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)  # of a worker that was killed
    scratch.mkdir()
    lists, vectors = _lists(work), Vectors(work["embedded"], work["parts"])
    neighbours = lists.neighbours(file=scratch / "neighbours.npy")
    if work["pieces"]:
        pieces = [[np.load(folder / name) for name in _piece_names(number)] for number in range(work["pieces"])]
        path = np.concatenate([path for path, _ in pieces])
        sizes = np.concatenate([np.diff(bounds) for _, bounds in pieces])
        path = settle(join_fragments(path, np.concatenate([[0], np.cumsum(sizes)]), vectors, scratch), neighbours)
    else:
        path = ORDERS[work["kind"]](lists, vectors)
    if work["dropped"]:
        path = path[~np.load(folder / "duplicates.npy")[path]]
    path = path.astype(np.int64)
    broken = jumps(neighbours, path)
    del neighbours
    shutil.rmtree(scratch)
    write_array(folder / ORDER, path)
    write_array(folder / STARTS, np.concatenate([[True], broken])[: len(path)])
    figures = {
        "documents": len(path),
        "near_duplicates": work["documents"] - len(path),
        "adjacent_similarity": round(adjacent_similarity(vectors, path), 4),
        "random_similarity": round(adjacent_similarity(vectors, path[random_order.order(len(path))]), 4),
        "jumps": int(broken.sum()),
    }
    return {"figures": figures, "files": record_files(folder, [ORDER, STARTS])}


def _lists(work: Unit) -> Lists:
    folder = Path(work["folder"])
    names = [neighbour_names(number) for number in range(work["ranges"])]
    return Lists([(folder / ids, folder / similarities) for ids, similarities in names])


def _piece_names(partition: int) -> tuple[str, str]:
    return f"fragments-{partition:05d}.npy", f"bounds-{partition:05d}.npy"

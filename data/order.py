"""The order in which documents are packed: by relatedness (In-Context Pretraining) or at random."""

from pathlib import Path
from typing import Any

import numpy as np

from conf.schema import RunConfig
from data.embed import embed, load_vectors
from data.manifest import Manifest, read_manifest
from data.metrics import adjacent_similarity, jumps, random_order
from data.neighbours import neighbour_names
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, run_stage, stage_folders, unit
from data.walk import build_graph, walk

ORDER = "order.npy"  # int64 [documents]: numbers of the curated documents (parts one after another) in order
QUERIES = 4096  # documents whose neighbours one unit finds


def order(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Orders the curated documents into ``{data.dir}/ordered-{order.kind}``.

    Figures: ``documents``, ``adjacent_similarity`` (mean cosine of consecutive documents), ``random_similarity`` (the
    same for a random order), ``jumps`` (consecutive documents that are no neighbours). The random order embeds nothing:
    its similarities and jumps are None.
    """
    kinds = {"in_context": in_context, "random": at_random}
    return kinds[config.order.kind](config, run_units)


def at_random(config: RunConfig, run_units: RunUnits) -> Manifest:
    """The random order."""
    folders = stage_folders(config)
    curated = read_manifest(folders.curated, command="curate")
    stage = Stage("order", 1, folders.ordered, {"kind": "random"}, curated, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        work = stage.units("random", [{"documents": curated.figures["kept"]}])
        results = run_units("order: shuffle", "data.order:random_unit", work)
        figures = {"adjacent_similarity": None, "random_similarity": None, "jumps": None}
        return {"documents": curated.figures["kept"], **figures}, collect_files(results)

    return run_stage(stage, body)


@unit
def random_unit(work: Unit) -> Unit:
    """Writes the random order."""
    write_array(Path(work["folder"]) / ORDER, random_order(work["documents"]))
    return {"files": record_files(work["folder"], [ORDER])}


def in_context(config: RunConfig, run_units: RunUnits) -> Manifest:
    """The order of the document walk over the neighbour graph of the embeddings."""
    folders = stage_folders(config)
    embedded = embed(config, run_units)
    settings = {"kind": "in_context", "neighbours": config.order.neighbours}
    stage = Stage("order", 1, folders.ordered, settings, embedded, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        documents = embedded.figures["documents"]
        shared = {"embedded": str(folders.embedded), "parts": embedded.figures["parts"], "k": config.order.neighbours}
        ranges = [(first, min(first + QUERIES, documents)) for first in range(0, documents, QUERIES)]
        queries = [{**shared, "index": i, "first": first, "last": last} for i, (first, last) in enumerate(ranges)]
        searches = stage.units("neighbours", queries)
        found = run_units("order: neighbours", "data.neighbours:neighbours_unit", searches)
        walks = stage.units("walk", [{**shared, "ranges": len(ranges)}])
        walked = run_units("order: walk", "data.order:walk_unit", walks)
        return {"documents": documents, **walked[0]["figures"]}, collect_files([*found, *walked])

    return run_stage(stage, body)


@unit
def walk_unit(work: Unit) -> Unit:
    """Walks the graph, writes the order and measures it."""
    folder = Path(work["folder"])
    names = [neighbour_names(index) for index in range(work["ranges"])]
    neighbours, similarities = (np.concatenate([np.load(folder / pair[side]) for pair in names]) for side in (0, 1))
    path = walk(build_graph(neighbours, similarities))
    write_array(folder / ORDER, path)
    vectors = load_vectors(work["embedded"], work["parts"])
    figures = {
        "adjacent_similarity": round(adjacent_similarity(vectors, path), 4),
        "random_similarity": round(adjacent_similarity(vectors, random_order(len(path))), 4),
        "jumps": jumps(neighbours, path),
    }
    return {"figures": figures, "files": record_files(folder, [ORDER])}

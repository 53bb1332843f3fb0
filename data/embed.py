"""The embedding stage: vectors of the curated documents by the embedder that the config names."""

from pathlib import Path
from typing import Any

from conf.errors import ConfigError
from conf.schema import RunConfig
from data.embedders import EMBEDDERS
from data.manifest import Manifest, read_manifest
from data.stages import RunUnits, Stage, collect_files, run_stage, stage_folders
from data.vectors import vectors_name


def embed(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Embeds the curated documents into ``{data.dir}/embedded``: ``vectors-*.npy``, float32 ``[documents, dims]``.

    Figures: ``documents``, ``dimensions``, ``parts``. Raises ConfigError where the embedder's model is missing.
    """
    folders, embedder = stage_folders(config), EMBEDDERS[config.order.embedder]
    curated = read_manifest(folders.curated, command="curate")
    model = Path(config.order.model).expanduser().absolute() if config.order.model else None
    if (model is None) != (config.order.embedder == "tfidf"):
        rule = "static and transformer embedders take a model's folder, tfidf takes none"
        raise ConfigError("order.model", config.order.model, rule, "order.embedder=transformer order.model=FOLDER")
    settings = embedder.settings(config.order)
    stage = Stage("embed", 2, folders.embedded, settings, curated, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = [{"index": i, **part} for i, part in enumerate(curated.figures["parts"]) if part["documents"]]
        shared = {**settings, "curated": str(folders.curated)} | ({"model_folder": str(model)} if model else {})
        dimensions, results = embedder.embed(stage, shared, parts, run_units)
        figures = {
            "documents": sum(part["documents"] for part in parts),
            "dimensions": dimensions,
            "parts": [{"file": vectors_name(p["index"]), "documents": p["documents"]} for p in parts],
        }
        return figures, collect_files(results)

    return run_stage(stage, body)

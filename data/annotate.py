"""Annotation: the columns of every active step beside the documents, in ``{data.dir}/annotated/STEP-FINGERPRINT``."""

from typing import Any

from conf.schema import RunConfig
from data.annotators import column_file, describe
from data.manifest import Manifest
from data.stages import RunUnits, Stage, collect_files, run_stage, stage_folders
from data.steps import active


def annotate(config: RunConfig, documents: Manifest, run_units: RunUnits) -> Manifest:
    """Computes the columns that are not there yet.

    Figures: those of ``documents``, and ``columns``: for each active step the folder of its columns.
    """
    folders = stage_folders(config)
    steps = {name: describe(annotator) for name, (_, annotator) in active(config.curation).items()}
    settings = {name: step["annotator"] for name, step in steps.items()}
    stage = Stage(
        "annotate",
        2,
        folders.annotated,
        settings,
        documents,
        overwrite=config.data.overwrite,
        keyed=True,
        store=True,
    )

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = documents.figures["parts"]
        work: list[dict[str, Any]] = [{"part": str(folders.documents / part["file"]), "steps": []} for part in parts]
        for step in steps.values():
            files = [{"file": column_file(step["columns"], part)} for part in parts]
            asked = [{**file, **{name: step[name] for name in ("kind", "settings", "annotator")}} for file in files]
            keys = [[step["annotator"], part["sha256"]] for part in parts]
            for unit, made in zip(work, stage.units(step["columns"], asked, keys), strict=True):
                unit["steps"].append(made)
        results = run_units("curate: annotate", "data.annotators:annotate_unit", work)
        columns = {name: step["columns"] for name, step in steps.items()}
        return {**documents.figures, "columns": columns}, collect_files(results)

    return run_stage(stage, body)

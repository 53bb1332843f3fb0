"""From raw vectors to those that are compared: the corpus mean subtracted (against hubs), unit length."""

from pathlib import Path

import numpy as np

from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, record_files, unit
from data.vectors import vectors_name

SAMPLE = 100_000  # vectors that the mean is taken over, at most


def raw_name(index: int) -> str:
    """The raw vectors of one curated part, float32 ``[documents, dims]``."""
    return f"raw-{index:05d}.npy"


def centre(stage: Stage, shared: Unit, parts: list[Unit], run_units: RunUnits) -> list[Unit]:
    """Writes the vectors of all parts from their raw ones."""
    count = sum(part["documents"] for part in parts)
    means = stage.units("mean", [{"indices": [part["index"] for part in parts], "step": -(-count // SAMPLE)}])
    found = run_units("order: mean", "data.embedders.centre:mean_unit", means)
    work = stage.units("centre", [{**shared, **part} for part in parts])
    return found + run_units("order: centre", "data.embedders.centre:centre_unit", work)


@unit
def mean_unit(work: Unit) -> Unit:
    """The mean of an even sample, of vectors that are finite and not zero."""
    folder, total, count = Path(work["folder"]), np.zeros(0), 0
    for index in work["indices"]:
        rows = np.load(folder / raw_name(index), mmap_mode="r")[:: work["step"]].astype(np.float64)
        rows = rows[np.isfinite(rows).all(axis=1) & rows.any(axis=1)]
        total, count = total + rows.sum(axis=0) if total.size else rows.sum(axis=0), count + len(rows)
    write_array(folder / "mean.npy", (total / max(1, count)).astype(np.float32))
    return {"files": record_files(folder, ["mean.npy"])}


@unit
def centre_unit(work: Unit) -> Unit:
    """The vectors of one part; a raw vector that is zero or not finite gives zero: a document without neighbours."""
    folder, name = Path(work["folder"]), vectors_name(work["index"])
    raw = np.load(folder / raw_name(work["index"]))
    usable = np.isfinite(raw).all(axis=1) & raw.any(axis=1)
    vectors = np.where(usable[:, None], np.where(usable[:, None], raw, 0) - np.load(folder / "mean.npy"), 0)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-6)
    write_array(folder / name, vectors.astype(np.float32))
    return {"unusable": int((~usable).sum()), "files": record_files(folder, [name])}

"""The default embedder, without a model: hashed TF-IDF, then truncated SVD (latent semantic analysis).

Deerwester et al. 1990; the randomised SVD of Halko et al. 2011 as scikit-learn has it. Every text's word counts are
hashed into a fixed number of columns (phase 1, by part), columns of words that occur in one document only are left
out, as they make nothing similar, the SVD is fitted on the whole corpus or on an even sample of it (phase 2), and every
part is projected, the corpus mean subtracted (against hubs) and the rows normalised (phase 3).
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import HashingVectorizer
from threadpoolctl import threadpool_limits

from conf.schema import OrderConfig
from data.documents import read_texts
from data.files import atomic_path
from data.shards import write_array
from data.stages import RunUnits, Stage, Unit, record_files, unit
from data.vectors import Floats, vectors_name

SEED = 0  # of the randomised SVD: the same corpus gives the same vectors whatever the run's seed is
FIT_DOCUMENTS = 20_000  # rows that the SVD is fitted on, at most
ITERATIONS = 2  # of the SVD's power method
FEATURE_TEXT = 200_000  # characters of a document that are looked at: its topic is clear by then
COMPONENTS = "components.npy"  # of the SVD, float32 [columns, dims]
Sparse = Any  # a scipy.sparse.csr_matrix, whose operators have no usable types


def settings(order: OrderConfig) -> dict[str, Any]:
    """What decides the vectors besides the documents."""
    return {"features": order.features, "dimensions": order.dimensions}


def embed(stage: Stage, shared: Unit, parts: list[Unit], run_units: RunUnits) -> tuple[int, list[Unit]]:
    """Writes the vectors of all parts; returns their dimensions and the units' results."""
    counted = run_units(
        "order: count words",
        "data.embedders.tfidf:count_unit",
        stage.units("count", [{**shared, **part} for part in parts]),
    )
    fits = stage.units("fit", [{**shared, "parts": [part["index"] for part in parts]}])
    fitted = run_units("order: fit the embedding", "data.embedders.tfidf:fit_unit", fits)
    projects = stage.units("project", [{**shared, **part} for part in parts])
    projected = run_units("order: embed", "data.embedders.tfidf:project_unit", projects)
    return fitted[0]["dimensions"], [*counted, *fitted, *projected]


@unit
def count_unit(work: Unit) -> Unit:
    """Phase 1: word counts of one part in hashed columns, CSR."""
    name = counts_name(work["index"])
    settings: Any = {"alternate_sign": False, "norm": None, "dtype": np.float32}  # the stubs know other types only
    vectorizer = HashingVectorizer(n_features=work["features"], **settings)
    texts = (text[:FEATURE_TEXT] for text in read_texts(Path(work["curated"]) / work["file"]))
    counts: Any = vectorizer.transform(texts)
    counts.sort_indices()
    _save(Path(work["folder"]) / name, data=counts.data, indices=counts.indices, indptr=counts.indptr)
    return {"files": record_files(work["folder"], [name])}


@unit
def fit_unit(work: Unit) -> Unit:
    """Phase 2: the columns in use, their inverse document frequencies, the SVD's components and the mean vector."""
    folder, name = Path(work["folder"]), "model.npz"
    frequency = np.zeros(work["features"], dtype=np.int64)
    documents = 0
    for index in work["parts"]:
        counts = load_counts(folder, index, work["features"])
        frequency += np.bincount(counts.indices, minlength=work["features"])
        documents += counts.shape[0]
    columns = np.flatnonzero(frequency >= 2)
    if columns.size < 2:  # hardly two documents share a word; the SVD wants two columns
        columns = np.union1d(columns, [0, 1])
    idf = (np.log((1 + documents) / (1 + frequency[columns])) + 1).astype(np.float32)
    step = max(1, -(-documents // FIT_DOCUMENTS))
    sample = [weigh(load_counts(folder, i, work["features"])[::step], columns, idf) for i in work["parts"]]
    matrix: Sparse = sp.vstack(sample, format="csr")
    components = fit_components(matrix, work["dimensions"])
    mean = np.asarray(matrix @ components.T).mean(axis=0, dtype=np.float64).astype(np.float32)
    write_array(folder / COMPONENTS, np.ascontiguousarray(components.T))  # as a product with sparse rows reads it
    _save(folder / name, columns=columns, idf=idf, mean=mean)
    return {"dimensions": len(components), "files": record_files(folder, [name, COMPONENTS])}


def fit_components(matrix: Sparse, dimensions: int) -> Floats:
    """The leading right singular vectors ``[dims, columns]``; dims is smaller where the matrix has a lower rank."""
    rank = min(dimensions, min(matrix.shape))
    if matrix.nnz == 0:
        return np.zeros((1, matrix.shape[1]), dtype=np.float32)
    with threadpool_limits(limits=1):  # the number of threads changes sums in their last bits
        svd = TruncatedSVD(rank, algorithm="randomized", n_iter=ITERATIONS, random_state=SEED)
        return np.ascontiguousarray(svd.fit(matrix).components_, dtype=np.float32)


@unit
def project_unit(work: Unit) -> Unit:
    """Phase 3: vectors of one part: TF-IDF projected on the components, mean subtracted, L2-normalised (or zero)."""
    folder, name = Path(work["folder"]), vectors_name(work["index"])
    model, components = np.load(folder / "model.npz"), np.load(folder / COMPONENTS, mmap_mode="r")
    rows = weigh(load_counts(folder, work["index"], work["features"]), model["columns"], model["idf"])
    vectors = np.asarray(rows @ np.asarray(components), dtype=np.float32) - model["mean"]
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 1e-6)
    write_array(folder / name, vectors)
    return {"files": record_files(folder, [name])}


def counts_name(index: int) -> str:
    """The word counts of one curated part."""
    return f"counts-{index:05d}.npz"


def load_counts(folder: Path, index: int, features: int) -> Sparse:
    """Word counts of one part, CSR ``[documents, features]``."""
    stored = np.load(folder / counts_name(index))
    shape = (len(stored["indptr"]) - 1, features)
    return sp.csr_matrix((stored["data"], stored["indices"], stored["indptr"]), shape=shape)


def weigh(counts: Sparse, columns: npt.NDArray[np.int64], idf: Floats) -> Sparse:
    """TF-IDF rows over ``columns``: (1 + log count) * idf, L2-normalised; float32 CSR."""
    rows = sp.csr_matrix(counts[:, columns])
    rows.data = (1 + np.log(rows.data)) * idf[rows.indices]
    norms = np.sqrt(np.asarray(rows.multiply(rows).sum(axis=1)).ravel())
    rows.data = (rows.data / np.repeat(np.maximum(norms, 1e-12), np.diff(rows.indptr))).astype(np.float32)
    return rows


def _save(path: Path, **arrays: npt.NDArray[Any]) -> None:
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **arrays)  # pyright: ignore[reportArgumentType]

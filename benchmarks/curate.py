"""Curation beside datatrove 0.10.1 on the same text in the same run: documents per CPU second and equal decisions.

    python -m benchmarks.curate --peer VENV/bin/python [--documents 2000] [--corpus FILE.jsonl]

The text is the Python documentation, cut to about the length of web pages, with planted exact and near duplicates (2 %
of the words left out). fastText's scores are those of a model trained on the spot: here a phase of ``sundog curate``
with the steps that are always on, from Parquet to columns, there the filter on texts in memory. Without ``--peer`` only
this package is measured. The peer's environment:
``pip install "datatrove[io,processing]==0.10.1" spacy orjson fasttext-numpy2-wheel``.
"""

import argparse
import json
import random
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from conf.curate import CurationConfig
from conf.schema import RunConfig
from data.annotators import Documents
from data.corpora import open_corpus, read_slice
from data.curate import curate
from data.documents import Document, read_columns
from data.preselect.linear import prepare, save_linear
from data.preselect.scorer import collapse
from data.stages import Unit, serial_units, stage_folders
from data.steps import STEPS
from data.steps.minhash import shingles

FILTERS = ("repetition", "gopher", "c4", "fineweb")
MAX_CHARS = 6_000  # of a document: the mean is then about 2.8 kB
PLANTED = 120  # of each kind
BATCH = 256
TIMEOUT_SEC = 3600
ROUNDING = 1e-5  # that fastText adds to a probability


def corpus(documents: int, seed: int = 0) -> list[dict[str, str]]:
    """Documents of the Python documentation of 500 characters and more, in random order."""
    config = RunConfig()
    rows = [
        {"id": record.id, "text": record.text[:MAX_CHARS]}
        for piece in open_corpus(config.data).slices
        for record in read_slice(piece.unit)
        if isinstance(record, Document) and len(record.text) >= 500
    ]
    random.Random(seed).shuffle(rows)
    return rows[:documents]


def plant(rows: list[dict[str, str]], seed: int = 1) -> list[dict[str, str]]:
    """The rows with exact and near copies of the first ones, in random order."""
    chance = random.Random(seed)
    exact = [{"id": f"exact/{row['id']}", "text": row["text"]} for row in rows[:PLANTED]]
    near = [
        {"id": f"near/{row['id']}", "text": " ".join(w for w in row["text"].split() if chance.random() >= 0.02)}
        for row in rows[PLANTED : 2 * PLANTED]
    ]
    mixed = [*rows, *exact, *near]
    chance.shuffle(mixed)
    return mixed


def filters(rows: list[dict[str, str]]) -> tuple[float, dict[str, list[str]]]:
    """CPU seconds of the four steps with their decisions; by id the steps that would drop the document."""
    config = CurationConfig()
    for name in FILTERS:
        getattr(config, name).enabled = True
    config.c4.terminal_punctuation = False
    decisions: dict[str, list[str]] = {row["id"]: [] for row in rows}
    start = time.process_time()
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        documents = Documents.of([row["text"] for row in batch])
        for name in FILTERS:
            annotator = STEPS[name].annotator(config)
            assert annotator is not None
            columns = annotator.columns(documents)
            table = pa.Table.from_pydict({f.name: pa.array(columns[f.name], f.type) for f in annotator.SCHEMA})
            for row, gone in zip(batch, _any(STEPS[name].reasons(table, config), len(batch)), strict=True):
                if gone and not (name == "fineweb" and "c4" in decisions[row["id"]]):
                    decisions[row["id"]].append(name)
    return time.process_time() - start, decisions


def _any(verdicts: Any, rows: int) -> list[bool]:
    found = [False] * rows
    for _, mask in verdicts:
        found = [a or bool(b) for a, b in zip(found, mask, strict=True)]
    return found


def minhash(path: Path, root: Path, bands: int, hashes: int) -> tuple[float, set[str], dict[str, int]]:
    """CPU seconds of a whole curation with near duplicates alone; ids that stay; pairs proposed and similar."""
    config = RunConfig()
    config.data.source, config.data.path, config.data.dir = "path", str(path), str(root)
    curation = CurationConfig(1, 0, 0, 0.0, 0.0, 0.0)
    curation.minhash.enabled, curation.minhash.bands, curation.minhash.rows = True, bands, hashes
    config.curation = curation
    start = time.process_time()
    manifest = curate(config, serial_units)
    seconds = time.process_time() - start
    folder = stage_folders(config).curated
    files = [folder / part["file"] for part in manifest.figures["parts"]]
    kept = {name for file in files for name in read_columns(file, ["id"]).column(0).to_pylist()}
    return seconds, kept, manifest.figures["near_pairs"]


def train(rows: list[dict[str, str]], folder: Path) -> Path:
    """A fastText model as PreSelect's that tells every second document from the others, and its linear form."""
    import fasttext

    lines = [f"__label__{number % 2} {prepare(row['text'])}\n" for number, row in enumerate(rows)]
    (folder / "train.txt").write_text("".join(lines))
    options = {"lr": 0.1, "dim": 100, "epoch": 5, "wordNgrams": 2, "minn": 0, "maxn": 0, "thread": 1, "verbose": 0}
    model = fasttext.train_supervised(str(folder / "train.txt"), **options)
    model.save_model(str(folder / "model.bin"))
    save_linear(collapse(model, 2), folder / "linear")
    return folder / "model.bin"


def fasttext_scores(path: Path, root: Path, scorer: Path) -> tuple[float, dict[str, float]]:
    """CPU seconds of the phase of a curation that scores; the probability of label 1 by id."""
    config = RunConfig()
    config.data.shard_documents = 10**6  # one part
    config.data.source, config.data.path, config.data.dir = "path", str(path), str(root)
    config.curation = CurationConfig(1, 0, 0, 0.0, 0.0, 0.0)
    config.curation.preselect.enabled, config.curation.preselect.scorer = True, str(scorer)
    seconds: dict[str, float] = {}

    def execute(label: str, function: str, units: list[Unit]) -> list[Unit]:
        start = time.process_time()
        results = serial_units(label, function, units)
        seconds[label] = time.process_time() - start
        return results

    curate(config, execute)
    documents, columns = stage_folders(config).documents, stage_folders(config).annotated
    ids = [read_columns(part, ["id"]).column(0).to_pylist() for part in documents.glob("parts/*.parquet")]
    odds = [read_columns(part, ["preselect"]).column(0).to_numpy() for part in columns.glob("preselect-*/*.parquet")]
    assert len(ids) == len(odds) == 1, "the corpus is one part"
    return seconds["curate: annotate"], dict(zip(ids[0], (1 / (1 + np.exp(-odds[0]))).tolist(), strict=True))


def similarities(rows: list[dict[str, str]], kind: str) -> dict[tuple[str, str], float]:
    """The Jaccard similarity of each planted copy and its source."""
    texts, size = {row["id"]: row["text"] for row in rows}, CurationConfig().minhash.shingle
    found = {}
    for name in texts:
        if name.startswith(f"{kind}/"):
            source = name.removeprefix(f"{kind}/")
            one, two = shingles(texts[name], size), shingles(texts[source], size)
            both = np.intersect1d(one, two).size
            found[name, source] = both / (one.size + two.size - both)
    return found


def recall(rows: list[dict[str, str]], kept: set[str], kind: str) -> tuple[int, int, int]:
    """Planted pairs of which one went; of how many whose similarity makes them duplicates; and how many are none."""
    pairs, least = similarities(rows, kind), CurationConfig().minhash.min_jaccard
    real = [pair for pair, similarity in pairs.items() if similarity >= least]
    return sum(copy not in kept or source not in kept for copy, source in real), len(real), len(pairs) - len(real)


def recalled(kind: str, counts: list[tuple[int, int, int]]) -> str:
    """The sums over plantings."""
    found, real, none = np.sum(counts, axis=0).tolist()
    return f"{kind} {found}/{real}" + (f" (and {none} too unlike)" if none else "")


def expected(rows: list[dict[str, str]], bands: int, hashes: int) -> float:
    """The share of near copies that share a band key, over all hash functions: 1 - (1 - s^hashes)^bands of each."""
    likeness, least = np.array([*similarities(rows, "near").values()]), CurationConfig().minhash.min_jaccard
    return float(np.mean(1 - (1 - likeness[likeness >= least] ** hashes) ** bands))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with datatrove")
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--plantings", type=int, default=5, help="draws of the planted copies that MinHash is shown")
    parser.add_argument("--corpus", type=Path, help="JSONL with id and text, instead of the Python documentation")
    options = parser.parse_args()
    rows = [json.loads(line) for line in options.corpus.open()] if options.corpus else corpus(options.documents)
    plain = rows[: options.documents]
    rows = plant(plain)
    size = sum(len(row["text"]) for row in rows) / len(rows)
    print(f"{len(rows)} documents, {size:.0f} characters on average")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for run in ("cold", "warm"):
            seconds, ours = filters(rows)
            print(f"filters, {run:<4}          {len(rows) / seconds:>8,.0f} documents per CPU second")
        for bands, hashes in ((14, 8), (18, 6)):
            seconds, kept, pairs = minhash(path, Path(folder) / f"m{bands}", bands, hashes)
            rate = f"{len(rows) / seconds:>8,.0f} documents per CPU second"
            print(f"MinHash {bands} x {hashes}, whole {rate}; pairs: {pairs}")
            counts = {kind: [recall(rows, kept, kind)] for kind in ("exact", "near")}
            means = [expected(rows, bands, hashes)]
            for seed in range(2, options.plantings + 1):
                others, file = plant(plain, seed), Path(folder) / f"planted-{seed}.jsonl"
                file.write_text("".join(json.dumps(row) + "\n" for row in others))
                _, kept, _ = minhash(file, Path(folder) / f"m{bands}-{seed}", bands, hashes)
                for kind, found in counts.items():
                    found.append(recall(others, kept, kind))
                means.append(expected(others, bands, hashes))
            planted = ", ".join(recalled(kind, found) for kind, found in counts.items())
            print(f"  {options.plantings} plantings, found: {planted}; near by arithmetic {np.mean(means):.1%}")
        model = train(rows, Path(folder))
        for run in ("cold", "warm"):
            seconds, scores = fasttext_scores(path, Path(folder) / f"fasttext-{run}", Path(folder))
            print(f"fastText, {run:<4}         {len(rows) / seconds:>8,.0f} documents per CPU second")
        if not options.peer:
            print(f"datatrove is not measured: --peer PYTHON. {(__doc__ or '').strip().splitlines()[-1]}")
            return
        command = [options.peer, str(Path(__file__).with_name("datatrove_peer.py")), str(path), str(model)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_SEC)  # it logs at length
        assert done.returncode == 0, done.stderr[-3000:]
    peer = json.loads(done.stdout.splitlines()[-1])
    for name, rate in peer["rates"].items():
        print(f"datatrove {name:<13} {rate:>8,.0f} documents per CPU second")
    planted = ", ".join(recalled(kind, [recall(rows, set(peer["kept"]), kind)]) for kind in ("exact", "near"))
    print(f"datatrove finds {planted} of the first planting")
    worst = max(abs(scores[name] + ROUNDING - probability) for name, probability in peer["scores"].items())
    print(f"fastText: largest difference {worst:.1e} of probability")
    different = [name for name, found in ours.items() if bool(found) != bool(peer["decisions"][name])]
    steps = {step: sum((step in ours[n]) != (step in peer["decisions"][n]) for n in ours) for step in FILTERS}
    print(f"equal decisions: {1 - len(different) / len(ours):.2%} of {len(ours)}; that differ by step: {steps}")
    for name in different[:20]:
        print(f"  {name}: ours {ours[name]}, datatrove {peer['decisions'][name]}")


if __name__ == "__main__":
    main()

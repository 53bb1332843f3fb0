"""``sundog scorer``: the fastText classifier that stands for the ladder on the whole corpus.

Trained as published (arXiv 2503.00808, section 3.3: learning rate 0.1, 100 dimensions, 5 epochs, word bigrams, no
subwords) on positives against negatives, then the row of the end-of-line token is set to zero, because its weight in
the mean of a text's rows tells its length. One thread, so that the same labels give the same model.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.errors import DataError, ResourceError
from conf.schema import RunConfig
from data.documents import read_columns
from data.files import atomic_path, write_atomic
from data.manifest import Manifest, read_manifest
from data.preselect.linear import END, LABEL, LinearScorer, prepare, save_linear
from data.preselect.score import STRENGTH_FILE, folder_of
from data.stages import RunUnits, Stage, Unit, record_files, run_stage, unit

MODEL, CARD, README, LINEAR = "model.bin", "card.json", "README.md", "linear"
TABLE_WORDS = 40  # of the influence table, each side
MIN_DOCUMENTS = 5  # that hold a word of the influence table
BINS = 10
Floats = npt.NDArray[np.float64]


def scorer(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Trains ``{preselect.dir}/scorer`` on the labels of the strength stage.

    Files: ``model.bin`` (fastText's), ``linear/`` (what curation reads), ``card.json``, ``README.md``. Figures: those
    of the card: ``auc`` on held-out documents, ``calibration``, ``influence``, counts. Raises DataError where a side
    is too small to hold documents out.
    """
    found = read_manifest(folder_of(config, "strength"), command="score")
    drawn = read_manifest(folder_of(config, "sample"), command="score")
    names = ("lr", "dim", "epochs", "word_ngrams", "buckets", "held_out")
    settings = {name: getattr(config.preselect, name) for name in names} | {"seed": config.seed}
    folder = folder_of(config, "scorer")
    stage = Stage("preselect_scorer", 1, folder, settings, found, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = [str(folder_of(config, "sample") / part["file"]) for part in drawn.figures["parts"]]
        work = {**settings, "parts": parts, "strength": str(folder_of(config, "strength") / STRENGTH_FILE)}
        work["ladder"] = [{k: model[k] for k in ("name", "ability", "source")} for model in found.figures["models"]]
        trained = run_units("scorer: train", "data.preselect.scorer:train_unit", stage.units("train", [work]))[0]
        return trained["card"], trained["files"]

    return run_stage(stage, body)


@unit
def train_unit(work: Unit) -> Unit:
    """Trains, corrects, measures and writes the scorer."""
    folder = Path(work["folder"])
    texts, labels = _labelled(work)
    held = split(labels, work["held_out"], work["seed"])
    model = _train([texts[i] for i in np.flatnonzero(~held)], labels[~held], work, folder)
    linear = collapse(model, work["word_ngrams"])
    with atomic_path(folder / MODEL) as temporary:
        model.save_model(str(temporary))
    odds = linear.log_odds([texts[i] for i in np.flatnonzero(held)])
    card = {
        "settings": {
            name: work[name] for name in ("lr", "dim", "epochs", "word_ngrams", "buckets", "held_out", "seed")
        },
        "ladder": work["ladder"],
        "positives": int((labels == 1).sum()),
        "negatives": int((labels == 0).sum()),
        "held_out": int(held.sum()),
        "words": len(linear.words),
        "auc": auc(odds, labels[held]),
        "calibration": calibration(odds, labels[held]),
        "influence": influence(linear, [texts[i] for i in np.flatnonzero(~held)]),
    }
    write_atomic(folder / CARD, json.dumps(card, indent=1) + "\n")
    write_atomic(folder / README, describe(card))
    names = [MODEL, CARD, README, *(f"{LINEAR}/{name}" for name in save_linear(linear, folder / LINEAR))]
    return {"card": card, "files": record_files(folder, names)}


def _labelled(work: Unit) -> tuple[list[str], npt.NDArray[np.int8]]:
    """Texts and labels of the positives and negatives, in the sample's order."""
    stored = read_columns(work["strength"], ["label"])["label"].to_pylist()
    texts: list[str] = []
    place = 0
    for part in work["parts"]:
        column = read_columns(part, ["text"])["text"].to_pylist()
        texts += [text for text, label in zip(column, stored[place:], strict=False) if label is not None]
        place += len(column)
    return texts, np.array([label for label in stored if label is not None], dtype=np.int8)


def split(labels: npt.NDArray[np.int8], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which documents are held out: of each label the same share, at least one; the rest trains."""
    held = np.zeros(len(labels), dtype=bool)
    for label in (0, 1):
        rows = np.random.default_rng([seed, label]).permutation(np.flatnonzero(labels == label))
        count = max(1, round(share * len(rows)))
        if len(rows) <= count:
            rule = "each label has documents to train on and at least one to hold out"
            fix = "sample more documents, or lower preselect.positive or preselect.held_out"
            raise DataError("preselect.held_out", f"{len(rows)} documents of label {label}", rule, fix)
        held[rows[:count]] = True
    return held


def _train(texts: list[str], labels: npt.NDArray[np.int8], work: Unit, folder: Path) -> Any:
    """A fastText model whose end-of-line row is zero."""
    try:
        import fasttext
    except ImportError as error:
        raise ResourceError("fasttext", "not installed", "the scorer is trained by it", "pip install sundog") from error
    order = np.random.default_rng(work["seed"]).permutation(len(texts))
    lines = [f"{LABEL}{labels[i]} {prepare(texts[i])}\n" for i in order]
    with atomic_path(folder / "train.txt") as temporary:
        temporary.write_text("".join(lines), encoding="utf-8", errors="replace")
        model = fasttext.train_supervised(
            str(temporary),
            lr=work["lr"],
            dim=work["dim"],
            epoch=work["epochs"],
            wordNgrams=work["word_ngrams"],
            bucket=work["buckets"],
            minn=0,
            maxn=0,
            seed=work["seed"],
            thread=1,
            verbose=0,
        )
    (folder / "train.txt").unlink(missing_ok=True)
    matrix = model.get_input_matrix().copy()
    matrix[model.get_word_id(END.decode())] = 0.0
    model.set_matrices(matrix, model.get_output_matrix().copy())
    return model


def collapse(model: Any, word_ngrams: int) -> LinearScorer:
    """A fastText model of the labels 0 and 1 as a linear scorer."""
    outputs = dict(zip(model.labels, model.get_output_matrix().astype(np.float64), strict=True))
    direction = outputs[LABEL + "1"] - outputs[LABEL + "0"]
    matrix = model.get_input_matrix()
    rows = np.concatenate([part.astype(np.float64) @ direction for part in np.array_split(matrix, 64)])
    words = [word.encode("utf-8", "replace") for word in model.get_words(on_unicode_error="replace")]
    return LinearScorer(words, rows, word_ngrams)


def auc(odds: Floats, labels: npt.NDArray[np.int8]) -> float:
    """Share of (positive, negative) pairs in the right order, ties a half (Mann-Whitney)."""
    negatives = np.sort(odds[labels == 0])
    positives = odds[labels == 1]
    below = np.searchsorted(negatives, positives, "left") + np.searchsorted(negatives, positives, "right")
    return float(below.sum() / (2 * len(positives) * len(negatives)))


def calibration(odds: Floats, labels: npt.NDArray[np.int8]) -> list[dict[str, float]]:
    """By bins of probability: documents, mean probability, share of positives."""
    probability = 1 / (1 + np.exp(-odds))
    bins = np.minimum((probability * BINS).astype(int), BINS - 1)
    return [
        {
            "from": b / BINS,
            "documents": int((bins == b).sum()),
            "probability": float(probability[bins == b].mean()),
            "positives": float((labels[bins == b] == 1).mean()),
        }
        for b in np.unique(bins).tolist()
    ]


def influence(linear: LinearScorer, texts: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Words that push a text towards each label most, among those of MIN_DOCUMENTS training documents (table A.3)."""
    held_by = Counter[bytes]()
    for text in texts:
        held_by.update(set(prepare(text).encode("utf-8", "replace").split()))
    frequent = [i for i, word in enumerate(linear.words) if held_by[word] >= MIN_DOCUMENTS and word != END]
    order = sorted(frequent, key=lambda i: (-linear.rows[i], i))
    tables = {"positive": order[:TABLE_WORDS], "negative": order[::-1][:TABLE_WORDS]}
    return {
        side: [
            {
                "word": linear.words[i].decode("utf-8", "replace"),
                "log_odds": float(linear.rows[i]),
                "documents": held_by[linear.words[i]],
            }
            for i in chosen
            if (linear.rows[i] > 0) == (side == "positive")
        ]
        for side, chosen in tables.items()
    }


def describe(card: dict[str, Any]) -> str:
    """The model card for people."""
    ladder = "\n".join(f"| {m['name']} | {m['ability']:.4g} | {m['source']} |" for m in card["ladder"])
    words = {side: ", ".join(f"`{row['word']}`" for row in rows[:15]) for side, rows in card["influence"].items()}
    bins = "\n".join(
        f"| {row['from']:.1f} | {row['documents']} | {row['probability']:.3f} | {row['positives']:.3f} |"
        for row in card["calibration"]
    )
    settings = ", ".join(f"{name} {value}" for name, value in card["settings"].items())
    return f"""# PreSelect scorer

A fastText classifier (`model.bin`, any fastText reads it) of text on which a ladder of language models is ranked as its
abilities rank it, after arXiv 2503.00808. `linear/` holds the same function as one number a word and n-gram bucket. The
row of the end-of-line token is zero. A newline counts as a space.

Trained on {card["positives"]} positives (full predictive strength) and {card["negatives"]} negatives (the lowest), less
{card["held_out"]} held out. **AUC on held-out documents: {card["auc"]:.4f}.** It says how well the classifier tells
its labels apart, not that the labels are good: see the report of the strengths for their controls.

Settings: {settings}.

| model of the ladder | ability | from |
|---|---|---|
{ladder}

Words for: {words["positive"]}.
Words against: {words["negative"]}.

| probability from | held-out documents | mean probability | share of positives |
|---|---|---|---|
{bins}
"""

"""The report of PreSelect: one page that shows what the strengths are worth before anybody selects by them."""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conf.schema import RunConfig
from data.documents import read_columns
from data.files import write_atomic
from data.manifest import Manifest, has_manifest, read_manifest
from data.page import page, pictures, png, sections, table, tiles
from data.preselect.score import STRENGTH_FILE, folder_of

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9680f", "#2c8a57", "#8a8f98"
SAMPLES, SAMPLE_CHARS, DOMAINS = 8, 300, 12


def write_report(config: RunConfig) -> Path:
    """Writes ``{preselect.dir}/report.html`` from the strength stage and, where it is there, the scorer."""
    found = read_manifest(folder_of(config, "strength"), command="score")
    drawn = read_manifest(folder_of(config, "sample"), command="score")
    scorer = folder_of(config, "scorer")
    card = read_manifest(scorer) if has_manifest(scorer) else None
    card = card if card and card.parent == found.fingerprint else None
    rows = read_columns(folder_of(config, "strength") / STRENGTH_FILE)
    files = {name: png(figure) for name, figure in _figures(found.figures, rows, card).items()}
    parts = _tables(found, card) + _samples(config, drawn, rows)
    body = tiles(_facts(found, card)) + pictures(files) + sections(parts)
    path = folder_of(config, "report.html")
    write_atomic(path, page("PreSelect", f"{path.parent}, strengths of {found.created}", body))
    return path


def _facts(found: Manifest, card: Manifest | None) -> list[tuple[str, str]]:
    figures = found.figures
    half = figures["reliability"]["split_half"]
    facts = [
        ("models", f"{len(figures['models'])}" + (f", {len(figures['failed'])} failed" if figures["failed"] else "")),
        ("documents", f"{figures['documents']:,}"),
        ("positives / negatives", f"{figures['positives']:,} / {figures['negatives']:,}"),
        ("without a finite loss", f"{figures['no_strength']:,}"),
        ("split-half reliability", _text(half)),
        ("window / stride", f"{figures['window']} / {figures['stride']} tokens"),
    ]
    return facts + ([("scorer's held-out AUC", f"{card.figures['auc']:.4f}")] if card else [])


def _text(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _axes(title: str, across: str, up: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_xlabel(across, fontsize=9)
    axes.set_ylabel(up, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def _figures(figures: dict[str, Any], rows: Any, card: Manifest | None) -> dict[str, Figure]:
    made = {"strength by domain": _histogram(figures, rows), "agreement of pairs": _pairs(figures)}
    if figures["controls"]:
        made["permuted rankings"] = _controls(figures["controls"])
    if card:
        made["calibration"] = _calibration(card.figures["calibration"])
    return made


def _histogram(figures: dict[str, Any], rows: Any) -> Figure:
    """Strengths, stacked by the most frequent domains."""
    figure, axes = _axes("Predictive strength", "strength", "documents")
    values, domains = rows["strength"].to_numpy(), np.array(rows["domain"].to_pylist(), dtype=object)
    names = list(figures["domains"])[:6]
    groups = [values[(domains == name) & np.isfinite(values)] for name in names]
    rest = values[~np.isin(domains.astype(str), names) & np.isfinite(values)]
    labels = [*names, *(["other"] if rest.size else [])]
    axes.hist(
        [*groups, *([rest] if rest.size else [])], bins=np.linspace(0, 1, 31).tolist(), stacked=True, label=labels
    )
    axes.legend(frameon=False, fontsize=8)
    return figure


def _pairs(figures: dict[str, Any]) -> Figure:
    """How often each pair's losses agree with its abilities, closest pairs of abilities first."""
    figure, axes = _axes("Pairs: losses that agree with abilities", "share of documents", "")
    models = figures["models"]
    pairs = sorted(figures["pairs"], key=lambda p: models[p["stronger"]]["ability"] - models[p["weaker"]]["ability"])
    names = [f"{models[p['weaker']]['name']} < {models[p['stronger']]['name']}" for p in pairs][::-1]
    axes.barh(range(len(pairs)), [p["agreement"] or 0.0 for p in pairs][::-1], color=BLUE)
    axes.axvline(0.5, color=GREY, linewidth=1)
    axes.set_yticks(range(len(pairs)), names, fontsize=7 if len(pairs) <= 15 else 4)
    axes.set_xlim(0, 1)
    return figure


def _controls(controls: dict[str, dict[str, Any]]) -> Figure:
    """The true ranking's statistics among those of random rankings."""
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained", facecolor="white")
    for index, (name, row) in enumerate(controls.items()):
        axes = figure.add_subplot(2, 2, index + 1)
        values = [value for value in (*row["permuted"], row["true"]) if value is not None]
        low, high = (min(values), max(values)) if values else (0.0, 0.0)
        wide = high - low > 1e-9  # every permutation of two models, say, has the same statistic up to rounding
        axes.hist(row["permuted"], bins=20, range=(low, high) if wide else (low - 0.5, high + 0.5), color=GREY)
        if row["true"] is not None:
            axes.axvline(row["true"], color=ORANGE, linewidth=2)
        axes.set_title(f"{name}, p = {_text(row['p'])}", loc="left", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _calibration(bins: list[dict[str, float]]) -> Figure:
    figure, axes = _axes("Scorer on held-out documents", "mean probability", "share of positives")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
    sizes = [10 + 90 * row["documents"] / max(r["documents"] for r in bins) for row in bins]
    axes.scatter([row["probability"] for row in bins], [row["positives"] for row in bins], s=sizes, color=BLUE)
    return figure


def _tables(found: Manifest, card: Manifest | None) -> list[tuple[str, str]]:
    figures = found.figures
    models = sorted(figures["models"], key=lambda model: model["ability"])
    ladder = [
        (m["name"], _text(m["ability"]), m["source"], f"{m['accuracy']:.3f} ± {m['accuracy_error']:.3f}",
         _text(m["mean_loss"]), f"{m['parameters']:,}", f"{m['weight']:g}")
        for m in models
    ]  # fmt: skip
    controls = [
        (
            name,
            _text(row["true"]),
            _text(float(np.median(row["permuted"]))) if row["permuted"] else "-",
            _text(row["p"]),
        )
        for name, row in figures["controls"].items()
    ]
    domains = [
        (name, f"{row['documents']:,}", _text(row["mean_strength"]), row["positives"], row["negatives"])
        for name, row in list(figures["domains"].items())[:DOMAINS]
    ]
    failed = [(name, reason) for name, reason in figures["failed"].items()]
    head = ("model", "ability", "from", "built-in accuracy", "bits a character", "parameters", "weight")
    parts = [
        ("Ladder, weakest first", table(ladder, head)),
        ("Models that did not load", table(failed) if failed else ""),
        ("Permuted rankings", table(controls, ("statistic", "true ranking", "median permuted", "p"))),
        ("Domains", table(domains, ("domain", "documents", "mean strength", "positives", "negatives"))),
    ]
    if card:
        sides = card.figures["influence"]
        columns = [
            [f"{row['word']} ({row['log_odds']:+.2g}, {row['documents']})" for row in sides[side]]
            for side in ("positive", "negative")
        ]
        influence = list(zip_longest(*columns, fillvalue=""))
        parts.append(("Words of most influence (log-odds, documents)", table(influence[:20], ("for", "against"))))
    return parts


def _samples(config: RunConfig, drawn: Manifest, rows: Any) -> list[tuple[str, str]]:
    """The beginnings of some positives and negatives."""
    labels = rows["label"].to_pylist()
    order = np.random.default_rng(config.seed).permutation(len(labels)).tolist()
    chosen = {side: [i for i in order if labels[i] == side][:SAMPLES] for side in (1, 0)}
    wanted, texts, place = {i for found in chosen.values() for i in found}, dict[int, str](), 0
    for part in drawn.figures["parts"]:
        column = read_columns(folder_of(config, "sample") / part["file"], ["text"])["text"]
        texts |= {i: column[i - place].as_py()[:SAMPLE_CHARS] for i in wanted if place <= i < place + len(column)}
        place += len(column)
    strengths, domains = rows["strength"].to_pylist(), rows["domain"].to_pylist()
    head = ("strength", "domain", "text")
    return [
        (title, table([(_text(strengths[i]), domains[i], texts[i]) for i in chosen[side]], head))
        for title, side in (("Positives", 1), ("Negatives", 0))
    ]

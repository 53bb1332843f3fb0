"""The one-page report of a curation: what was kept and dropped and why, histograms, samples of both."""

import html
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.schema import RunConfig
from data import page
from data.annotators import column_file
from data.documents import read_columns
from data.files import write_atomic
from data.manifest import Manifest, read_manifest
from data.selection import part_file
from data.stages import stage_folders
from data.steps import STEPS

PARTS = 20  # evenly spread over the corpus, that histograms and samples are taken from
BINS = 30
SAMPLES, SAMPLE_CHARS = 3, 300  # of each reason, and of what stays
GREEN, RED = "#2c8a57", "#c0492f"  # kept, dropped


def steps_of(reasons: Sequence[str]) -> dict[str, str]:
    """The step behind each reason; reading and the passes over the corpus have no step of their own."""
    known = {reason: name for name, step in STEPS.items() for reason in step.REASONS}
    passes = {"duplicate_text": "exact", "duplicate_id": "exact", "near_duplicate": "minhash"}
    return {reason: known.get(reason) or passes.get(reason, "reading") for reason in reasons}


def write_report(config: RunConfig, curated: Manifest) -> Path:
    """Writes ``{data.dir}/curation.html`` from a finished curation; the columns tell all, no text is measured again."""
    folders = stage_folders(config)
    annotated = read_manifest(folders.annotated)
    parts: list[dict[str, Any]] = annotated.figures["parts"]
    chosen = [parts[i] for i in sorted({int(i) for i in np.linspace(0, len(parts) - 1, min(PARTS, len(parts)))})]
    kept_masks, numbers, samples = [], {}, {}
    for part in chosen:
        reasons = read_columns(folders.curated / part_file(curated, "decisions", part)).column("reason").to_pylist()
        kept_masks.append(np.array([reason is None for reason in reasons]))
        for step, columns in annotated.figures["columns"].items():
            table = read_columns(folders.annotated / column_file(columns, part)).slice(0, len(reasons))
            for field in table.schema:
                if str(field.type) in ("double", "float", "int64"):
                    numbers.setdefault(f"{step}: {field.name}", []).append(table.column(field.name).to_numpy())
        _take_samples(samples, folders.documents / part["file"], reasons)
    kept = np.concatenate(kept_masks)
    figures = "".join(_histogram(name, np.concatenate(rows), kept) for name, rows in numbers.items())
    path = folders.curated.parent / "curation.html"
    note = f"<p>Kept above, dropped below; {kept.size:,} documents of {len(chosen)} parts.</p>"
    parts_of_page = [("Documents", _summary(curated)), ("Measures", note + figures), ("Samples", _samples(samples))]
    facts = f"{curated.figures['chars_kept']:,} characters kept, {curated.figures['edited']:,} documents edited"
    subtitle = f"{facts}; fingerprint {curated.fingerprint[:16]}, {curated.created}"
    write_atomic(path, page.page("Curation", subtitle, page.sections(parts_of_page)))
    return path


def _take_samples(samples: dict[str, list[str]], path: Path, reasons: list[str | None]) -> None:
    """Adds starts of texts, up to SAMPLES for each reason."""
    room = Counter({name: SAMPLES - len(rows) for name, rows in samples.items()})
    wanted = []
    for row, reason in enumerate(reasons):
        name = reason or "kept"
        if room.get(name, SAMPLES) > 0:
            room[name] = room.get(name, SAMPLES) - 1
            wanted.append((row, name))
    if wanted:
        texts = read_columns(path, ["id", "text"]).take([row for row, _ in wanted]).to_pylist()
        for (_, name), found in zip(wanted, texts, strict=True):
            samples.setdefault(name, []).append(f"{found['id']}\n{found['text'][:SAMPLE_CHARS]}")


def _summary(curated: Manifest) -> str:
    figures = curated.figures
    steps, read = steps_of(list(figures["dropped"])), max(1, figures["documents_read"])
    rows = [("", "read", figures["documents_read"]), ("", "kept", figures["kept"])]
    rows += [(steps[reason], reason, count) for reason, count in figures["dropped"].items()]
    shown = [(step, name, f"{count:,}", f"{count / read:.2%}") for step, name, count in rows]
    return page.table(shown, ("step", "reason", "documents", "share"))


def _histogram(name: str, values: npt.NDArray[Any], kept: npt.NDArray[np.bool_]) -> str:
    """Two rows of bars over one axis; wide positive ranges get a logarithmic one."""
    known = np.isfinite(values.astype(np.float64))
    values, kept = values[known].astype(np.float64), kept[known]
    if not values.size or values.min() == values.max():
        return ""
    wide = values.min() >= 0 and values.max() > 1000
    shown = np.log10(values + 1) if wide else values
    edges = np.linspace(shown.min(), shown.max(), BINS + 1)
    above, below = np.histogram(shown[kept], edges)[0], np.histogram(shown[~kept], edges)[0]
    tallest = max(1, int(above.max()), int(below.max()))
    bars = "".join(
        f'<rect fill="{color}" x="{8 * i}" y="{40 - h if color == GREEN else 41:.1f}" width="7" height="{h:.1f}"/>'
        for color, counts in ((GREEN, above), (RED, below))
        for i, h in enumerate(40 * counts / tallest)
    )
    ends = [10**edge - 1 if wide else edge for edge in (edges[0], edges[-1])]
    low, high = (f"{end:,.0f}" if abs(end) >= 100 or math.isclose(end, round(end)) else f"{end:.3g}" for end in ends)
    caption = f"{html.escape(name)}: {low} to {high}{' (log)' if wide else ''}"
    drawing = f'<svg width="{8 * BINS}" height="82">{bars}</svg><figcaption>{caption}</figcaption>'
    return f'<figure style="display:inline-block;margin:.5em">{drawing}</figure>'


def _samples(samples: dict[str, list[str]]) -> str:
    names = sorted(samples, key=lambda name: (name != "kept", name))
    return page.table([(name, text) for name in names for text in samples[name]], ("reason", "text"))

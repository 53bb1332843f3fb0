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
STYLE = (
    "body{font:15px/1.5 system-ui;max-width:60em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;text-align:left;border-bottom:1px solid #8884}td.n{text-align:right}"
    "pre{white-space:pre-wrap;background:#8881;padding:.6em}figure{display:inline-block;margin:.5em}"
    "figcaption{font-size:13px}.k{fill:#2a7f4f}.d{fill:#c0492f}"
)


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
    body = (
        f"{_summary(curated)}<h2>Measures</h2><p>Kept above, dropped below; {kept.size:,} documents of {len(chosen)} "
    )
    body += f"parts.</p>{figures}<h2>Samples</h2>{_samples(samples)}"
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Curation</title><style>{STYLE}</style>{body}'
    write_atomic(path, page + "</html>\n")
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
    cells = "".join(
        f'<tr><td>{step}<td>{html.escape(name)}<td class="n">{count:,}<td class="n">{count / read:.2%}'
        for step, name, count in rows
    )
    head = f"<h1>Curation</h1><p>{figures['chars_kept']:,} characters kept, {figures['edited']:,} documents edited. "
    head += f"Fingerprint {curated.fingerprint[:16]}, {curated.created}.</p>"
    return f'{head}<table><tr><th>step<th>reason<th class="n">documents<th class="n">share{cells}</table>'


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
        f'<rect class="{mark}" x="{8 * i}" y="{40 - h if mark == "k" else 41:.1f}" width="7" height="{h:.1f}"/>'
        for mark, counts in (("k", above), ("d", below))
        for i, h in enumerate(40 * counts / tallest)
    )
    ends = [10**edge - 1 if wide else edge for edge in (edges[0], edges[-1])]
    low, high = (f"{end:,.0f}" if abs(end) >= 100 or math.isclose(end, round(end)) else f"{end:.3g}" for end in ends)
    caption = f"{html.escape(name)}: {low} to {high}{' (log)' if wide else ''}"
    return f'<figure><svg width="{8 * BINS}" height="82">{bars}</svg><figcaption>{caption}</figcaption></figure>'


def _samples(samples: dict[str, list[str]]) -> str:
    names = sorted(samples, key=lambda name: (name != "kept", name))
    return "".join(
        f"<h3>{html.escape(name)}</h3>" + "".join(f"<pre>{html.escape(text)}</pre>" for text in samples[name])
        for name in names
    )

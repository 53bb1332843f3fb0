"""The mix of real and synthetic documents, exact by tokens.

All is counted by the training tokenizer, with the token that ends a document. The synthetic share of the tokens is
``rephrase.share``: 0.5 pairs a rephrased token with each real one, as WRAP does. With S synthetic tokens there are
R = S (1 - share) / share real ones; what there is too much of is drawn from, by a seeded hash: of the real documents
those whose rephrases are in the mix come first. ``rephrase.real=all`` keeps every real document and lets the share fall
where rephrases are too few. The last document of a draw is cut where its count says, so that sums are met exactly.
"""

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.errors import DataError
from conf.schema import RunConfig
from data.documents import SCHEMA, Document, read_batches, read_columns, row_writer
from data.files import canonical_json
from data.manifest import Manifest, read_manifest
from data.pack import make_tokenizer, part_names, tokenize
from data.rephrase.prepare import draw, folder_of
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, run_stage, stage_folders, unit
from data.tokenize import TOKENIZER, Tokenizer, load_tokenizer

REAL = "real"
SOURCE = "rephrase"  # first part of a synthetic document's source; its style is the second


@dataclass(frozen=True)
class Row:
    """A document that may be in the mix: where it is, and its tokens with the one that ends it."""

    part: int
    row: int
    tokens: int
    key: str  # decides its place in a draw


@dataclass(frozen=True)
class Draw:
    """Whole documents, and one that is cut to a number of tokens (with its end), to a sum."""

    whole: list[Row]
    cut: tuple[Row, int] | None
    tokens: int


def draw_tokens(rows: Sequence[Row], goal: int, cuttable: Callable[[Row, int], bool]) -> Draw:
    """Takes rows in order until their tokens are ``goal`` exactly, the last one cut.

    A row may only be cut where ``cuttable(row, tokens)`` says so; else it is left out and later ones are tried.
    """
    whole: list[Row] = []
    held = 0
    late: list[Row] = []
    for row in rows:
        if held + row.tokens <= goal:
            whole.append(row)
            held += row.tokens
        else:
            late.append(row)
        if held == goal:
            return Draw(whole, None, held)
    rest = goal - held
    found = next((row for row in late if rest < row.tokens and cuttable(row, rest)), None)
    return Draw(whole, (found, rest) if found else None, held + (rest if found else 0))


def cut_text(text: str, tokens: int, tokenizer: Tokenizer) -> str | None:
    """The longest beginning of a text that has exactly ``tokens`` tokens; None where no beginning has.

    The count grows with the text, by one or few; beginnings around the place of that token are tried.
    """
    if tokens < 1:
        return None
    offsets = tokenizer.fast.encode(text, add_special_tokens=False).offsets
    if len(offsets) < tokens:
        return None
    around = offsets[tokens - 1][1]
    for place in sorted(
        range(max(1, around - 24), min(len(text), around + 24) + 1), key=lambda p: (abs(p - around), -p)
    ):
        if len(tokenizer.encode(text[:place])) == tokens:
            return text[:place]
    return None


def goals(real: int, synthetic: int, share: float, keep_all: bool) -> tuple[int, int]:
    """Real and synthetic tokens of the mix that there are enough of, in the share that was asked for.

    >>> goals(100, 40, 0.5, False), goals(100, 400, 0.5, False), goals(100, 40, 0.5, True), goals(100, 40, 0.0, False)
    ((40, 40), (100, 100), (100, 40), (100, 0))
    """
    wanted = round(real * share / (1 - share))
    if wanted <= synthetic or keep_all:
        return real, min(wanted, synthetic)
    return round(synthetic * (1 - share) / share), synthetic


def mix(
    config: RunConfig, judged: Manifest, dropped: dict[str, str], made: dict[str, Any], run_units: RunUnits
) -> Manifest:
    """Writes ``{data.dir}/mixed/curated``, which `order`, `pack` and `train` take with ``data.dir={data.dir}/mixed``.

    Figures: those of a curation (``kept``, ``parts``, ``chars_kept``), ``tokens`` (real, synthetic),
    ``tokens_by_style``, ``tokens_by_source`` (real ones and those of its rephrases by style), ``available``, ``share``.
    Raises DataError where no rephrase was accepted and the share is not 0.
    """
    wanted, folders = config.rephrase, stage_folders(config)
    curated = read_manifest(folders.curated, command="curate")
    tokenizer = make_tokenizer(config, curated, run_units)
    tokenized = tokenize(config, curated, tokenizer, None, run_units)
    names = ("share", "real", "style_weights")
    settings = {**{name: getattr(wanted, name) for name in names}, "seed": config.seed, "made": made}
    settings |= {"tokenizer": tokenizer.files[TOKENIZER]["sha256"], "curated": curated.fingerprint}
    folder = Path(config.data.dir).expanduser().absolute() / "mixed" / "curated"
    stage = Stage("mix", 2, folder, settings, judged, [sorted(dropped.items())], overwrite=True)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        encoder = load_tokenizer(folders.tokenizer)
        pool = _synthetic(config, judged, dropped, encoder)
        if not pool.rows and wanted.share:
            reasons = dict(Counter(judged.figures["reasons"]) + Counter(dropped.values()))
            rule, fix = (
                "at least one rephrase is accepted",
                "another rephrase.model or endpoint, or looser rephrase.filters",
            )
            raise DataError("rephrase.filters", f"accepted none: {canonical_json(reasons)}", rule, fix)
        real = _real_rows(config, curated, tokenized, {row["document"] for row in pool.rows})
        available = {"real": sum(r.tokens for r in real), "synthetic": sum(row["tokens"] for row in pool.rows)}
        want_real, want_synthetic = goals(available["real"], available["synthetic"], wanted.share, wanted.real == "all")
        by_style = pool.draw(want_synthetic, wanted.style_weights)
        reached = sum(found.tokens for found in by_style.values())
        if wanted.real == "matched" and reached < want_synthetic:  # a style with a weight had too few
            want_real = goals(available["real"], reached, wanted.share, False)[0]
        texts = _RealTexts(folders.curated, curated.figures["parts"])
        chosen = draw_tokens(real, want_real, lambda row, n: cut_text(texts(row), n - 1, encoder) is not None)
        shared = {"seed": config.seed, "curated": str(folders.curated), "tokenizer": str(folders.tokenizer)}
        work: list[Unit] = []
        for index, part in enumerate(curated.figures["parts"]):
            rows = sorted([row.row, row.tokens] for row in chosen.whole if row.part == index)
            cut = [chosen.cut[0].row, chosen.cut[1]] if chosen.cut and chosen.cut[0].part == index else None
            if rows or cut:
                work.append({**shared, "file": part["file"], "rows": rows, "cut": cut, "index": len(work)})
        results = run_units("rephrase: real text", "data.rephrase.mix:real_unit", stage.units("real", work))
        written = pool.write(folder, by_style, made, encoder)
        parts = [{"file": r["file"], "documents": r["documents"]} for r in [*results, *([written] if written else [])]]
        tokens = {"real": chosen.tokens, "synthetic": reached}
        sources = sum((Counter(r["sources"]) for r in results), Counter[str]())
        by_source = {name: {REAL: count} for name, count in sorted(sources.items())}
        for (name, style), count in sorted(pool.by_source(by_style).items()):
            by_source.setdefault(name, {})[style] = count
        figures = {
            "kept": sum(part["documents"] for part in parts),
            "parts": parts,
            "chars_kept": sum(r["chars"] for r in results) + (written["chars"] if written else 0),
            "licence": curated.figures["licence"],
            "tokens": tokens,
            "tokens_by_style": {name: found.tokens for name, found in by_style.items()},
            "tokens_by_source": by_source,
            "available": available,
            "share": tokens["synthetic"] / max(1, sum(tokens.values())),
        }
        return figures, collect_files([*results, *([written] if written else [])])

    return run_stage(stage, body)


class _RealTexts:
    """Texts of single curated documents; the part read last is kept."""

    def __init__(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        self.folder, self.parts = folder, parts
        self.part, self.texts = -1, None

    def __call__(self, row: Row) -> str:
        if row.part != self.part:
            self.part = row.part
            self.texts = read_columns(self.folder / self.parts[row.part]["file"], ["text"]).column(0)
        assert self.texts is not None, "a part was read"
        return self.texts[row.row].as_py()


def _real_rows(config: RunConfig, curated: Manifest, tokenized: Manifest, parents: set[str]) -> list[Row]:
    """Rows of all real documents, parents of accepted rephrases first, else by a seeded hash."""
    folders, rows = stage_folders(config), []
    for index, (part, made) in enumerate(zip(curated.figures["parts"], tokenized.figures["parts"], strict=True)):
        lengths = np.diff(np.load(folders.tokenized / part_names(made["index"])[1])).tolist()
        ids = read_columns(folders.curated / part["file"], ["id"]).column(0).to_pylist()
        rows += [Row(index, row, n, name) for row, (name, n) in enumerate(zip(ids, lengths, strict=True))]
    return sorted(rows, key=lambda row: (row.key not in parents, draw("real", config.seed, row.key), row.part, row.row))


@dataclass
class _Pool:
    """The accepted rephrases, in memory: rows of JUDGED with their tokens by the training tokenizer."""

    rows: list[Unit]
    seed: int
    tokenizer: Tokenizer

    def draw(self, goal: int, weights: dict[str, float]) -> dict[str, Draw]:
        """Draws ``goal`` tokens: of all styles together, or of each by its weight. Exact unless a style has too few."""

        def rows(style: str | None) -> list[Row]:
            mine = [
                Row(0, index, row["tokens"], row["request"])
                for index, row in enumerate(self.rows)
                if style in (None, row["style"])
            ]
            return sorted(mine, key=lambda row: draw("synthetic", self.seed, row.key))

        def cuttable(row: Row, tokens: int) -> bool:
            return cut_text(self.rows[row.row]["text"], tokens - 1, self.tokenizer) is not None

        if not weights:
            found = draw_tokens(rows(None), goal, cuttable)
            return self._by_style(found)
        total = sum(weights.values())
        ends = [round(goal * end / total) for end in itertools.accumulate(weights.values())]
        shares = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        return {style: draw_tokens(rows(style), n, cuttable) for style, n in zip(weights, shares, strict=True)}

    def _by_style(self, found: Draw) -> dict[str, Draw]:
        names = sorted({self.rows[row.row]["style"] for row in [*found.whole, *([found.cut[0]] if found.cut else [])]})
        split = {}
        for name in names:
            whole = [row for row in found.whole if self.rows[row.row]["style"] == name]
            cut = found.cut if found.cut and self.rows[found.cut[0].row]["style"] == name else None
            split[name] = Draw(whole, cut, sum(row.tokens for row in whole) + (cut[1] if cut else 0))
        return split

    def by_source(self, drawn: dict[str, Draw]) -> Counter[tuple[str, str]]:
        """The drawn tokens by their parents' source and their style."""
        counts = Counter[tuple[str, str]]()
        for style, found in drawn.items():
            for row, tokens in [*((row, row.tokens) for row in found.whole), *([found.cut] if found.cut else [])]:
                counts[self.rows[row.row]["source"], style] += tokens
        return counts

    def write(self, folder: Path, drawn: dict[str, Draw], made: dict[str, Any], tokenizer: Tokenizer) -> Unit | None:
        """Writes the drawn rows as documents with their provenance; None where there are none."""
        name, chars = "documents/synthetic.parquet", 0
        chosen = [(row, None) for found in drawn.values() for row in found.whole]
        chosen += [found.cut for found in drawn.values() if found.cut]
        if not chosen:
            return None
        with row_writer(folder / name, SCHEMA) as rows:
            for row, tokens in sorted(chosen, key=lambda pair: pair[0].row):
                found = self.rows[row.row]
                text = found["text"] if tokens is None else cut_text(found["text"], tokens - 1, tokenizer)
                assert text is not None, "the draw asked whether it can be cut"
                chars += len(text)
                rows.add(synthetic_document(found, text, made).row(), len(text))
        return {"file": name, "documents": rows.count, "chars": chars, "files": record_files(folder, [name])}


def synthetic_document(row: Unit, text: str, made: dict[str, Any]) -> Document:
    """A document that says which chunk, prompt, model, sampling and seed it comes from."""
    origin = {
        "chunk": row["chunk"],
        "parent": row["document"],
        "style": row["style"],
        "prompt": made["prompts"][row["style"]],
        "model": made["model"],
        "model_name": made["model_name"],
        "sampling": made["sampling"],
        "seed": row["seed"],
    }
    scores = {"quality": float(row["quality"]), "source_quality": float(row["source_quality"])}
    metadata = json.dumps(origin, sort_keys=True)
    return Document(f"rephrase/{row['request']}", text, f"{SOURCE}/{row['style']}", metadata=metadata, scores=scores)


def _synthetic(config: RunConfig, judged: Manifest, dropped: dict[str, str], tokenizer: Tokenizer) -> _Pool:
    """What passed the filters and is no repeat, nor of a chunk with text of an evaluation set."""
    rows: list[Unit] = []
    for part in judged.figures["parts"]:
        for batch in read_batches(folder_of(config, "judged") / part["judged"], None):
            for row in batch.to_pylist():
                if final_reason(row, dropped) is None:
                    row["tokens"] = len(tokenizer.encode(row["text"])) + 1
                    rows.append(row)
    return _Pool(rows, config.seed, tokenizer)


def final_reason(row: Unit, dropped: dict[str, str]) -> str | None:
    """Why a judged row is not accepted, after all: by a filter, as a repeat, or for its source; None if it is."""
    if row["reason"] is not None:
        return row["reason"]
    if dropped.get(row["chunk"]) == "contaminated":
        return "contaminated_source"
    return dropped.get(row["request"])


@unit
def real_unit(work: Unit) -> Unit:
    """The real documents of one part that are in the mix."""
    name, rows = f"documents/real-{work['index']:05d}.parquet", dict(work["rows"])
    tokenizer = load_tokenizer(work["tokenizer"]) if work["cut"] else None
    place, chars, sources = 0, 0, Counter[str]()
    with row_writer(Path(work["folder"]) / name, SCHEMA) as out:
        for document in _documents(Path(work["curated"]) / work["file"]):
            if work["cut"] and place == work["cut"][0]:
                assert tokenizer is not None, "it is loaded where a document is cut"
                document["text"] = cut_text(document["text"], work["cut"][1] - 1, tokenizer) or ""
                rows[place] = work["cut"][1]
            if place in rows:
                chars += len(document["text"])
                sources[document["source"]] += rows[place]
                out.add(document, len(document["text"]))
            place += 1
    counts = {"file": name, "documents": out.count, "chars": chars, "sources": dict(sources)}
    return {**counts, "files": record_files(work["folder"], [name])}


def _documents(path: Path) -> Iterator[Unit]:
    for batch in read_batches(path, SCHEMA.names):
        yield from batch.to_pylist()

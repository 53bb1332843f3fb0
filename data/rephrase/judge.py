"""Which answers become documents: the filters on each, then repeats and evaluation sets over all of them.

Two phases: ``judge`` applies the filters part by part; then the originals and what passed go through the curation of
data/curate.py as one corpus, originals first, so that an output near to an original or to an earlier output goes, and
so does one that holds text of an evaluation set. Every request ends under one reason or is accepted.
"""

import copy
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa

from conf.curate import CurationConfig, MinhashConfig
from conf.rephrase import OutputFilterConfig
from conf.schema import RunConfig
from data.curate import curate
from data.documents import read_batches, read_columns, row_writer
from data.manifest import Manifest, read_manifest
from data.rephrase.answers import Generator
from data.rephrase.clean import clean
from data.rephrase.filters import Output, judge
from data.rephrase.prepare import counter, folder_of
from data.rephrase.quality import qualities
from data.rephrase.styles import Style, load_styles, style_of
from data.selection import part_file
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, run_stage, stage_folders, unit

JUDGED = pa.schema(
    [(name, pa.string()) for name in ("request", "chunk", "document", "source", "style", "bucket", "reason", "text")]
    + [(name, pa.int64()) for name in ("seed", "source_tokens", "tokens", "prompt_tokens", "spent_tokens")]
    + [("source_quality", pa.float32()), ("quality", pa.float32())]
)  # reason is null, or why the filters reject; tokens are those of the text, spent_tokens those of the raw answer
TEXTS = pa.schema([("id", pa.string()), ("text", pa.string())])
ORIGINALS, OUTPUTS = "0-originals", "1-outputs"  # in this order in the corpus: of repeats the first one stays


def judge_answers(config: RunConfig, answered: Manifest, tokenizer: str, scorer: str, run_units: RunUnits) -> Manifest:
    """Applies the filters. Figures: ``parts`` (chunks, judged), ``reasons`` (counts; accepted under ``""``)."""
    wanted, folder = config.rephrase, folder_of(config, "judged")
    styles = {name: dataclasses.asdict(style) for name, style in load_styles(wanted.styles, wanted.style_files).items()}
    limits = dataclasses.asdict(wanted.filters)
    settings = {"limits": limits, "styles": styles}  # one set at a time: all texts in the folder are one corpus
    stage = Stage("rephrase_judge", 3, folder, settings, answered, overwrite=True, keyed=True)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = answered.figures["parts"]
        shared = {"requests": str(folder_of(config, "requests")), "answers_folder": str(folder_of(config, "answers"))}
        shared |= {"tokenizer": tokenizer, "scorer": scorer, "styles": styles, "limits": limits}
        work = [{**shared, "chunks": part["chunks"], "answers": part["answers"]} for part in parts]
        keys = [[limits, styles, answered.files[part["answers"]]["sha256"], part["chunks"]] for part in parts]
        results = run_units("rephrase: filters", "data.rephrase.judge:judge_unit", stage.units("judge", work, keys))
        reasons = sum((Counter(result["reasons"]) for result in results), Counter[str]())
        files = [{"chunks": part["chunks"], "judged": r["judged"]} for part, r in zip(parts, results, strict=True)]
        return {"parts": files, "reasons": dict(reasons)}, collect_files(results)

    return run_stage(stage, body)


@unit
def judge_unit(work: Unit) -> Unit:
    """Judges the answers of one part; writes the texts of its chunks and of what passed as a corpus."""
    folder, stem = Path(work["folder"]), f"{Path(work['answers']).stem[:40]}-{work['key']}"
    names = [f"judged/{stem}.parquet", *(f"texts/{kind}-{stem}.parquet" for kind in (ORIGINALS, OUTPUTS))]
    styles = {name: style_of(tree) for name, tree in work["styles"].items()}
    limits, reasons = OutputFilterConfig(**work["limits"]), Counter[str]()
    columns = ["chunk", "document", "source", "text", "tokens", "language", "quality"]
    chunks = read_columns(Path(work["requests"]) / work["chunks"], columns)
    with row_writer(folder / names[1], TEXTS) as texts:
        for name, text in zip(chunks["chunk"].to_pylist(), chunks["text"].to_pylist(), strict=True):
            texts.add({"id": name, "text": text}, len(text))
    with row_writer(folder / names[0], JUDGED) as rows, row_writer(folder / names[2], TEXTS) as texts:
        for batch in read_batches(Path(work["answers_folder"]) / work["answers"], None):
            for row in _judged(batch.to_pylist(), chunks, styles, limits, work):
                reasons[row["reason"] or ""] += 1
                rows.add(row, len(row["text"]))
                if row["reason"] is None:
                    texts.add({"id": row["request"], "text": row["text"]}, len(row["text"]))
    return {"judged": names[0], "reasons": dict(reasons), "files": record_files(folder, names)}


def _judged(
    answers: list[Unit], chunks: pa.Table, styles: dict[str, Style], limits: OutputFilterConfig, work: Unit
) -> list[Unit]:
    count, found = counter(work["tokenizer"]), []
    texts = [clean(answer["raw"] or "", styles[answer["style"]]).text for answer in answers]
    rated = qualities(texts, work["scorer"]).tolist()
    sources = chunks.take([answer["row"] for answer in answers]).to_pylist()
    for answer, text, quality, source in zip(answers, texts, rated, sources, strict=True):
        reason, tokens = answer["error"], count(text)
        if reason is None:
            output = Output(
                source=source["text"],
                raw=answer["raw"],
                finish=answer["finish"],
                style=styles[answer["style"]],
                source_tokens=source["tokens"],
                tokens=tokens,
                language=source["language"],
                source_quality=source["quality"],
                quality=quality,
            )
            reason = judge(output, limits) or None
        row = {name: answer[name] for name in ("request", "chunk", "style", "bucket", "seed", "prompt_tokens")}
        row |= {name: source[name] for name in ("document", "source")}
        row |= {"source_tokens": source["tokens"], "source_quality": source["quality"]}
        row |= {"reason": reason, "text": text, "tokens": tokens, "quality": quality, "spent_tokens": answer["tokens"]}
        found.append(row)
    return found


def find_repeats(config: RunConfig, judged: Manifest, run_units: RunUnits) -> dict[str, str]:
    """Why outputs that passed the filters go for all that: request to reason; also those of contaminated chunks."""
    if not judged.figures["reasons"].get(""):
        return {}
    own = copy.deepcopy(config)
    own.data.source, own.data.format, own.data.text_field, own.data.id_field = "path", "parquet", "text", "id"
    own.data.path, own.data.dir = str(folder_of(config, "judged") / "texts"), str(folder_of(config, "repeats"))
    own.data.limit, own.data.overwrite = 0, True
    own.curation = CurationConfig(min_chars=0, max_chars=0, max_line_chars=0, min_letter_fraction=0.0)
    own.curation.max_repeated_line_fraction = own.curation.max_replacement_fraction = 0.0
    own.curation.minhash = MinhashConfig(enabled=True, min_jaccard=config.rephrase.filters.min_jaccard)
    own.curation.decontaminate = config.curation.decontaminate
    curated = curate(own, run_units)
    folders, dropped = stage_folders(own), {}
    documents = read_manifest(folders.documents)
    for part in documents.figures["parts"]:
        ids = read_columns(folders.documents / part["file"], ["id"]).column(0).to_pylist()
        reasons = read_columns(folders.curated / part_file(curated, "decisions", part)).column("reason").to_pylist()
        dropped |= {name: reason for name, reason in zip(ids, reasons, strict=True) if reason is not None}
    return dropped


def provenance(generator: Generator, styles: dict[str, Style], sampling: dict[str, float]) -> dict[str, Any]:
    """What every synthetic row says of its making, besides its own parent, style and seed."""
    prompts = {name: f"{style.name}.{style.version}-{style.digest}" for name, style in styles.items()}
    return {"model": generator.model, "model_name": generator.name, "sampling": sampling, "prompts": prompts}

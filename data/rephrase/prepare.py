"""From curated documents to requests: chunks, their quality, the styles that suit each.

Two phases, both by part and keyed by what decides them: ``chunks`` cuts and measures; ``requests`` routes, once the
quality of all chunks is known. What is not rephrased is counted by reason: nothing disappears.
"""

import dataclasses
import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from conf.errors import DataError
from conf.schema import RunConfig
from data.annotators import path_digest
from data.documents import read_batches, read_columns, row_writer
from data.files import digest_json
from data.manifest import Manifest, read_manifest
from data.preselect.linear import load_linear
from data.preselect.select import ordered_bits, thresholds
from data.rephrase.chunks import Count, chunk
from data.rephrase.quality import qualities
from data.rephrase.styles import BUCKETS, ROUTED, Style, load_styles, style_of
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, run_stage, stage_folders, unit
from data.steps.language import detect
from data.tokenize import load_tokenizer, tokenizer_file

CHUNKS = pa.schema(
    [
        ("chunk", pa.string()),  # id of the document, then where the chunk is in its text
        ("document", pa.string()),
        ("source", pa.string()),
        ("start", pa.int64()),
        ("end", pa.int64()),
        ("text", pa.string()),
        ("tokens", pa.int64()),
        ("language", pa.string()),
        ("quality", pa.float32()),
        ("skipped", pa.string()),  # why it is not rephrased, or null
    ]
)
REQUESTS = pa.schema(
    [(name, pa.string()) for name in ("request", "chunk", "style", "bucket")]
    + [("row", pa.int64()), ("seed", pa.int64()), ("max_tokens", pa.int64())]
)
CODE = re.compile(
    r"\s*(?:"
    + "|".join(
        (
            r"(?:def|class|import|from|return|if|elif|else|for|while|with|try|except|raise|assert|yield|lambda)\b.*[:(=]",
            r"(?:>>>|\.\.\.|@|#include|\$ )",
            r".*[;{}]\s*$",
            r"\w[\w.\[\]'\"]*(?:, *\w+)* *[-+*/|&]?= *\S",
            r"[\w.]+\(.*\)[,:]?\s*$",
            r"[)\]}]+,?\s*$",
            r"from \S+ import |import \S+$",
        )
    )
    + ")"
)
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
BYTES_PER_TOKEN = 4  # of English text, about, where no tokenizer is given
SPARE_TOKENS = 32  # of an answer, for its sentinels and for a text that is judged as too long
FEW_TOKENS = 12  # a chunk of fewer has nothing to rephrase


def folder_of(config: RunConfig, stage: str) -> Path:
    """The folder of one of the stages of rephrasing."""
    return Path(config.data.dir).expanduser().absolute() / "rephrase" / stage


@lru_cache(maxsize=4)
def counter(tokenizer: str) -> Count:
    """Counts the tokens of a text: by a tokenizer's folder or file, else a token for every four bytes."""
    if not tokenizer:
        return lambda text: -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
    loaded = load_tokenizer(tokenizer)
    return lambda text: len(loaded.encode(text))


def prepare(config: RunConfig, model: str, tokenizer: str, run_units: RunUnits) -> Manifest:
    """Cuts the curated documents into chunks and chooses their styles.

    ``model`` identifies the generator, ``tokenizer`` counts tokens. Figures: ``documents``, ``chunks``, ``skipped``
    (chunks and documents by reason), ``requests``, ``by_style``, ``by_bucket``, ``bounds`` (of the buckets), ``parts``
    (files of chunks and of requests). Raises DataError for a broken style, scorer or tokenizer.
    """
    wanted = config.rephrase
    curated = read_manifest(stage_folders(config).curated, command="curate")
    styles = load_styles(wanted.styles, wanted.style_files)
    scorer = str(Path(wanted.scorer).expanduser().absolute() / "linear") if wanted.scorer else ""
    if scorer:
        load_linear(scorer)
    cutting = {
        "chunk_tokens": wanted.chunk_tokens,
        "tokenizer": path_digest(tokenizer_file(tokenizer)) if tokenizer else "",
        "scorer": path_digest(scorer) if scorer else "",
        "languages": sorted(wanted.languages),
        "max_code": wanted.max_code,
    }
    routing = {name: getattr(wanted, name) for name in ("low", "high", "per_chunk", "portion", "temperature", "top_p")}
    routing |= {"styles": {name: style.digest for name, style in styles.items()}, "model": model, "seed": config.seed}
    routing["suits"] = {name: [getattr(style, field) for field in ROUTED] for name, style in styles.items()}
    routing["longest"] = {name: style.length_ratio[1] for name, style in styles.items()} if tokenizer else {}
    folder = folder_of(config, "requests")
    stage = Stage("rephrase_requests", 2, folder, {**cutting, **routing}, curated, keyed=True, store=True)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = [part for part in curated.figures["parts"] if part["documents"]]
        shared = {
            "curated": str(stage_folders(config).curated),
            "cutting": cutting,
            "tokenizer": tokenizer,
            "scorer": scorer,
        }
        work = [{**shared, "file": part["file"]} for part in parts]
        keys = [[cutting, curated.files[part["file"]]["sha256"]] for part in parts]
        cut = run_units("rephrase: chunks", "data.rephrase.prepare:chunk_unit", stage.units("chunks", work, keys))
        bounds = _bounds([folder / result["chunks"] for result in cut], wanted.low, wanted.high)
        trees = {name: dataclasses.asdict(style) for name, style in styles.items()}
        shared = {"routing": routing, "styles": trees, "bounds": bounds}
        work = [{**shared, "chunks": result["chunks"]} for result in cut]
        keys = [[routing, bounds, result["files"][result["chunks"]]["sha256"]] for result in cut]
        routed = run_units(
            "rephrase: styles", "data.rephrase.prepare:request_unit", stage.units("requests", work, keys)
        )
        counts = {
            name: dict(sorted(sum((Counter(r[name]) for r in [*cut, *routed] if name in r), Counter()).items()))
            for name in ("skipped", "by_style", "by_bucket")
        }
        if not (requests := sum(result["count"] for result in routed)):
            value = ", ".join(f"{reason} {count}" for reason, count in counts["skipped"].items()) or "no document"
            rule, fix = (
                "at least one chunk suits a style",
                "loosen rephrase.languages, rephrase.styles or rephrase.portion",
            )
            raise DataError("rephrase", f"nothing to rephrase: {value}", rule, fix)
        figures = {
            "documents": curated.figures["kept"],
            "chunks": sum(result["count"] for result in cut),
            "requests": requests,
            **counts,
            "bounds": bounds,
            "parts": [{"chunks": c["chunks"], "requests": r["requests"]} for c, r in zip(cut, routed, strict=True)],
        }
        return figures, collect_files([*cut, *routed])

    return run_stage(stage, body)


@unit
def chunk_unit(work: Unit) -> Unit:
    """Chunks of one part; a document without any is counted as ``empty``."""
    name, count = f"chunks/{Path(work['file']).stem}-{work['key']}.parquet", counter(work["tokenizer"])
    skipped: Counter[str] = Counter()
    with row_writer(Path(work["folder"]) / name, CHUNKS) as rows:
        for batch in read_batches(Path(work["curated"]) / work["file"], ["id", "source", "text"], rows=64):
            found = [
                row for document in batch.to_pylist() for row in _chunks(document, work["cutting"], count, skipped)
            ]
            texts = [row["text"] for row in found]
            rated = zip(found, qualities(texts, work["scorer"]).tolist(), strict=True)
            for row, quality in rated:
                skipped[row["skipped"]] += row["skipped"] is not None
                rows.add({**row, "quality": quality}, len(row["text"]))
    counts = {reason: number for reason, number in sorted(skipped.items(), key=str) if number}
    return {"chunks": name, "count": rows.count, "skipped": counts, "files": record_files(work["folder"], [name])}


def _chunks(document: Unit, cutting: Unit, count: Count, skipped: Counter[str]) -> Iterator[Unit]:
    text = document["text"]
    spans = chunk(text, cutting["chunk_tokens"], count)
    skipped["empty"] += not spans
    for span in spans:
        piece = text[span.start : span.end]
        language = detect(piece)[0]
        yield {
            "chunk": f"{document['id']}#{span.start}-{span.end}",
            "document": document["id"],
            "source": document["source"],
            "start": span.start,
            "end": span.end,
            "text": piece,
            "tokens": span.tokens,
            "language": language,
            "skipped": _skip(piece, span.tokens, language, cutting),
        }


def _skip(text: str, tokens: int, language: str, cutting: Unit) -> str | None:
    if tokens < FEW_TOKENS:
        return "too_short"
    if code_share(text) > cutting["max_code"]:
        return "code"
    if cutting["languages"] and language not in cutting["languages"]:
        return "language"
    return None


def code_share(text: str) -> float:
    """Share of the lines that look like program code."""
    lines = [line for line in text.splitlines() if line.strip()]
    return sum(CODE.match(line) is not None for line in lines) / max(1, len(lines))


def _bounds(files: list[Path], low: float, high: float) -> list[float]:
    """Qualities at which the medium and the high bucket begin, over all chunks that are rephrased; exact."""

    def passes() -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], npt.NDArray[Any]]]:
        for file in files:
            table = read_columns(file, ["quality", "skipped"])
            scores = table.filter(table["skipped"].is_null())["quality"].to_numpy()
            if scores.size:
                yield scores.astype(np.float32), np.ones(scores.size, np.int64), np.full(scores.size, "", dtype=object)

    return [thresholds(passes, keep).get("", 0) if keep else 2**32 for keep in (1 - low, high)]


def bucket_of(quality: npt.NDArray[np.float32], bounds: list[int]) -> list[str]:
    """The bucket of each quality."""
    return [BUCKETS[i] for i in np.searchsorted(bounds, ordered_bits(quality).astype(np.int64), side="right")]


def draw(*parts: Any) -> int:
    """64 bits that depend on the parts alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def most_tokens(chunk: Unit, style: Style, routing: Unit) -> int:
    """What a request may generate: hardly more than the band of lengths allows, where tokens are counted."""
    if style.name not in routing["longest"]:
        return style.max_tokens
    return min(style.max_tokens, math.ceil(chunk["tokens"] * routing["longest"][style.name]) + SPARE_TOKENS)


def request_id(chunk: Unit, style: str, routing: Unit, seed: int, max_tokens: int) -> str:
    """Digest of all that decides the answer: chunk and its text, prompt version, model, sampling, seed."""
    sampling = [routing["temperature"], routing["top_p"], seed, max_tokens]
    return digest_json([chunk["chunk"], chunk["text"], style, routing["styles"][style], routing["model"], sampling])[
        :32
    ]


@unit
def request_unit(work: Unit) -> Unit:
    """The requests of one part of chunks."""
    routing, styles = work["routing"], {name: style_of(tree) for name, tree in work["styles"].items()}
    name = f"requests/{Path(work['chunks']).stem}-{work['key']}.parquet"
    skipped, by_style, by_bucket = Counter[str](), Counter[str](), Counter[str]()
    place = 0
    with row_writer(Path(work["folder"]) / name, REQUESTS) as rows:
        for batch in read_batches(
            Path(work["folder"]) / work["chunks"], ["chunk", "text", "tokens", "quality", "skipped"]
        ):
            buckets = bucket_of(batch["quality"].to_numpy(), work["bounds"])
            for row, (chunk, bucket) in enumerate(zip(batch.to_pylist(), buckets, strict=True), place):
                if chunk["skipped"] is not None:
                    continue
                by_bucket[bucket] += 1
                chosen = _choose(chunk, bucket, styles, routing)
                if isinstance(chosen, str):
                    skipped[chosen] += 1
                    continue
                for style in chosen:
                    by_style[style] += 1
                    seed = draw("seed", routing["seed"], chunk["chunk"], style) % 2**31
                    most = most_tokens(chunk, styles[style], routing)
                    name_of = request_id(chunk, style, routing, seed, most)
                    wanted = {"request": name_of, "chunk": chunk["chunk"], "seed": seed, "max_tokens": most}
                    rows.add({**wanted, "style": style, "bucket": bucket, "row": row})
            place += batch.num_rows
    counts = {"skipped": dict(skipped), "by_style": dict(by_style), "by_bucket": dict(by_bucket)}
    return {"requests": name, "count": rows.count, **counts, "files": record_files(work["folder"], [name])}


def _choose(chunk: Unit, bucket: str, styles: dict[str, Style], routing: Unit) -> list[str] | str:
    """The styles of a chunk, drawn among those that suit it; or why there are none."""
    if draw("portion", routing["seed"], chunk["chunk"]) >= routing["portion"] * 2**64:
        return "not_drawn"
    numbers = len(set(NUMBER.findall(chunk["text"])))
    suited = [
        name
        for name, style in styles.items()
        if bucket in style.quality
        and style.source_tokens[0] <= chunk["tokens"] <= style.source_tokens[1]
        and (numbers >= 2 or not style.needs_numbers)
    ]
    if not suited:
        return "no_style"
    suited.sort(key=lambda name: draw("style", routing["seed"], chunk["chunk"], name))
    return suited[: routing["per_chunk"]]

"""Packing: documents in order, an end token after each, cut into windows of exactly ``data.context`` tokens.

The tokenizer comes first (trained on the curated documents, or loaded), then every curated part is tokenised into
``{data.dir}/tokenized``, where any order and any context length find it; then contiguous ranges of the order are
gathered into one output shard each. Only the last window of a shard is padded. Ranges depend on the settings alone, so
the bytes do not depend on who did the work, or how often.
"""

import itertools
import os
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from conf.errors import DataError
from conf.schema import RunConfig
from data.documents import read_texts
from data.files import atomic_path, file_digest
from data.images import CONFIG as IMAGE_CONFIG
from data.images import WEIGHTS as IMAGE_WEIGHTS
from data.images import image_tokenizer_digest, interleave, read_codes, read_image_spec, without_marks
from data.manifest import Manifest, read_manifest
from data.order import ORDER, STARTS
from data.permutation import permute
from data.shards import shard_names, token_dtype, write_array, write_shard
from data.stages import RunUnits, Stage, Unit, collect_files, record_files, run_stage, stage_folders, unit
from data.tokenize import (
    IMAGE_TOKENIZER,
    SETTINGS,
    TOKENIZER,
    add_images,
    copy_tokenizer,
    load_tokenizer,
    resident_tokenizer,
    tokenizer_file,
    train_tokenizer,
)
from data.vectors import OPEN

TRAINING_CHARS = 4_000_000  # of the corpus that a tokenizer is trained on, at most; more changes few merges
TRAINING_TEXT = 20_000  # of one document
BLOCK, UNSORTED_KEY = 64, 0x0DD  # documents that are drawn together for unsorted windows
ENCODE_UNIT = "models.image_codes:encode_unit"  # by name: what turns images into codes needs torch, which no data does
BATCH, BATCH_CHARS = 64, 1_000_000  # documents and characters, about, that are encoded together


def pack(config: RunConfig, run_units: RunUnits) -> Manifest:
    """Packs the ordered documents into ``{data.dir}/packed-{order.kind}-{data.context}`` (see ``data.shards``).

    Figures: ``windows``, ``tokens`` (without padding), ``documents``, ``padding_fraction``, ``cut_fraction`` (documents
    in more pieces than their length asks for), ``vocab_size``, ``eos_id``, ``pad_id``, ``shard_windows``. Raises
    DataError when the order belongs to another state of the curated documents.
    """
    folders = stage_folders(config)
    ordered = read_manifest(folders.ordered, command=f"order order={config.order.kind}")
    curated = read_manifest(folders.curated, command="curate")
    ancestors = [entry["fingerprint"] for entry in ordered.lineage if entry["stage"] == curated.stage]
    if ancestors != [curated.fingerprint]:
        raise stale(folders.ordered, ancestors, curated)
    tokenizer = make_tokenizer(config, curated, run_units)
    images = encode_images(config, curated, run_units)
    tokenized = tokenize(config, curated, tokenizer, images, run_units)
    digest = tokenizer.figures["digest"]
    settings = {
        "context": config.data.context,
        "shard_documents": config.data.shard_documents,
        "packing": config.data.packing,
        "unsorted": config.data.unsorted,
        "tokenizer": digest,
        "tokenized": tokenized.fingerprint,
    }
    stage = Stage("pack", 4, folders.packed, settings, ordered, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        documents, size = ordered.figures["documents"], config.data.shard_documents
        figures = {name: tokenizer.figures[name] for name in ("vocab_size", "eos_id", "pad_id")}
        shared = {
            "images": tokenizer.figures["images"],
            **figures,
            "context": config.data.context,
            "packing": config.data.packing,
            "unsorted": config.data.unsorted,
            "ordered": str(folders.ordered),
            "tokenized": str(folders.tokenized),
            "parts": tokenized.figures["parts"],
        }
        firsts = range(0, documents, size)
        work = [{**shared, "index": i, "first": f, "last": min(f + size, documents)} for i, f in enumerate(firsts)]
        results = run_units("pack: windows", "data.pack:pack_unit", stage.units("pack", work))
        windows, tokens, cut = (sum(result[name] for result in results) for name in ("windows", "tokens", "cut"))
        padding = 1 - tokens / (windows * config.data.context) if windows else 0.0
        figures |= {"windows": windows, "tokens": tokens, "documents": documents, "padding_fraction": round(padding, 6)}
        figures["cut_fraction"] = round(cut / documents, 6) if documents else 0.0
        figures["shard_windows"] = [result["windows"] for result in results]
        return figures, collect_files(results)

    return run_stage(stage, body)


def stale(folder: Path, ancestors: list[str], curated: Manifest) -> DataError:
    """The error for an order of documents that have been curated again since."""
    value = f"made from curated {', '.join(a[:16] for a in ancestors)}, which is now {curated.fingerprint[:16]}"
    rule = "an order belongs to the curated documents that it was made from"
    return DataError(str(folder), value, rule, "run `sundog order data.overwrite=true`, then pack again")


def make_tokenizer(config: RunConfig, curated: Manifest, run_units: RunUnits) -> Manifest:
    """Trains or copies the tokenizer into ``{data.dir}/tokenizer``, and gives it ids for images.

    Figures: ``vocab_size``, ``eos_id``, ``pad_id``, ``digest``, ``images`` (ids of begin and end of an image, or none).
    Raises DataError where an image does not fit in a window.
    """
    folders, data = stage_folders(config), config.data
    if data.tokenizer:
        file = tokenizer_file(data.tokenizer)
        load_tokenizer(file)  # a broken one is found before anything is written
        settings, parent = {"loaded": file_digest(file)}, None
        work: Unit = {"source": str(file.absolute())}
    else:
        settings, parent = {"vocab_size": data.vocab_size}, curated
        parts = [str(folders.curated / part["file"]) for part in curated.figures["parts"]]
        work = {"vocab_size": data.vocab_size, "parts": parts, "chars": curated.figures["chars_kept"]}
    if data.image_tokenizer:
        spec = read_image_spec(data.image_tokenizer)
        if spec.tokens + 2 > data.context:
            rule = f"a window holds an image whole: {spec.tokens} tokens, its begin and its end"
            raise DataError("data.context", data.context, rule, f"data.context={spec.tokens + 2} or more")
        settings |= {"images": image_tokenizer_digest(data.image_tokenizer)}
        work |= {"image_tokenizer": str(Path(data.image_tokenizer).expanduser().absolute()), "codes": spec.codes}
    stage = Stage("tokenizer", 2, folders.tokenizer, settings, parent, overwrite=data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        [result] = run_units("pack: tokenizer", "data.pack:tokenizer_unit", stage.units("tokenizer", [work]))
        return result["figures"], collect_files([result])

    return run_stage(stage, body)


@unit
def tokenizer_unit(work: Unit) -> Unit:
    """Trains a tokenizer on an even sample of the curated documents, or copies the user's."""
    folder = work["folder"]
    if "source" in work:
        copy_tokenizer(work["source"], folder)
    else:
        step = max(1, work["chars"] // TRAINING_CHARS)
        texts = itertools.chain.from_iterable(read_texts(part) for part in work["parts"])
        texts = map(without_marks, texts) if "image_tokenizer" in work else texts
        sample = (text[:TRAINING_TEXT] for text in itertools.islice(texts, 0, None, step))
        train_tokenizer(sample, work["vocab_size"], folder)
    names = [TOKENIZER, SETTINGS]
    if "image_tokenizer" in work:
        add_images(folder, work["image_tokenizer"], work["codes"])
        names += [f"{IMAGE_TOKENIZER}/{name}" for name in (IMAGE_CONFIG, IMAGE_WEIGHTS)]
    tokenizer = load_tokenizer(folder)
    figures = {name: getattr(tokenizer, name) for name in ("vocab_size", "eos_id", "pad_id", "digest")}
    figures["images"] = [tokenizer.images.begin, tokenizer.images.end] if tokenizer.images else []
    return {"figures": figures, "files": record_files(folder, names)}


def encode_images(config: RunConfig, curated: Manifest, run_units: RunUnits) -> Manifest | None:
    """Turns the documents' images into codes in ``{data.dir}/image_codes``; None for a corpus of text alone."""
    data, folders = config.data, stage_folders(config)
    if not data.image_tokenizer:
        return None
    settings = image_tokenizer_digest(data.image_tokenizer)
    stage = Stage("images", 1, folders.image_codes, settings, curated, overwrite=data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        where = {"image_tokenizer": str(Path(data.image_tokenizer).expanduser().absolute())}
        shared = {**where, "curated": str(folders.curated)}
        parts = enumerate(curated.figures["parts"])
        work = [{**shared, "index": index, "file": part["file"]} for index, part in parts]
        results = run_units("pack: images", ENCODE_UNIT, stage.units("images", work))
        return {"images": sum(result["images"] for result in results)}, collect_files(results)

    return run_stage(stage, body)


def tokenize(
    config: RunConfig, curated: Manifest, tokenizer: Manifest, images: Manifest | None, run_units: RunUnits
) -> Manifest:
    """Tokenises the curated parts into ``{data.dir}/tokenized``. Figures: ``documents``, ``tokens``, ``parts``."""
    folders = stage_folders(config)
    settings = {"tokenizer": tokenizer.figures["digest"], "images": images.fingerprint if images else ""}
    stage = Stage("tokenize", 2, folders.tokenized, settings, curated, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = curated.figures["parts"]
        shared = {"tokenizer": str(folders.tokenizer), "curated": str(folders.curated)}
        shared["digest"] = tokenizer.figures["digest"]
        shared["image_codes"] = str(folders.image_codes) if images else ""
        work = [{**shared, "index": index, "file": part["file"]} for index, part in enumerate(parts)]
        results = run_units("pack: tokenize", "data.pack:tokenize_unit", stage.units("tokenize", work))
        dtype = token_dtype(tokenizer.figures["vocab_size"])
        records = [{"index": i, "documents": r["documents"], "dtype": dtype} for i, r in enumerate(results)]
        figures = {"documents": sum(r["documents"] for r in results), "tokens": sum(r["tokens"] for r in results)}
        return {**figures, "parts": records}, collect_files(results)

    return run_stage(stage, body)


def part_names(index: int) -> tuple[str, str]:
    """Files of one tokenised part: tokens one document after another, and int64 ``[documents + 1]`` offsets."""
    return f"part-{index:05d}.bin", f"offsets-{index:05d}.npy"


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups of at most BATCH texts that hold about BATCH_CHARS characters."""
    group: list[str] = []
    chars = 0
    for text in texts:
        group.append(text)
        chars += len(text)
        if len(group) == BATCH or chars >= BATCH_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group


@unit
def tokenize_unit(work: Unit) -> Unit:
    """Tokenises one curated part, an end token after each document. Memory: one batch, and the part's image codes."""
    folder, names = Path(work["folder"]), part_names(work["index"])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one of several on the machine
    tokenizer = resident_tokenizer(work["tokenizer"], work["digest"])
    dtype, lengths = token_dtype(tokenizer.vocab_size), [0]
    codes = read_codes(work["image_codes"], work["index"]) if work["image_codes"] else {}
    with atomic_path(folder / names[0]) as temporary, open(temporary, "wb") as file:
        for texts in batches(read_texts(Path(work["curated"]) / work["file"])):
            for ids in interleave(tokenizer, texts, codes):
                file.write(np.array([*ids, tokenizer.eos_id], dtype=dtype).tobytes())
                lengths.append(len(ids) + 1)
    write_array(folder / names[1], np.cumsum(lengths, dtype=np.int64))
    return {"documents": len(lengths) - 1, "tokens": sum(lengths), "files": record_files(folder, names)}


@unit
def pack_unit(work: Unit) -> Unit:
    """Gathers the documents ``first:last`` of the order into one output shard."""
    order, starts = (np.load(Path(work["ordered"]) / name, mmap_mode="r") for name in (ORDER, STARTS))
    places = np.arange(work["first"], work["last"])
    if work["unsorted"]:
        places = partly_unsorted(len(order), work["unsorted"])[places]
    documents = zip(places.tolist(), gather(Path(work["tokenized"]), work["parts"], order[places]), strict=True)
    joined = np.append(False, np.diff(places) == 1) & ~np.asarray(starts[places])
    names = ("context", "vocab_size", "pad_id", "packing")
    sizes = [work[name] for name in names]
    runs, images = np.cumsum(~joined), tuple(work["images"])
    counts = write_shard(work["folder"], work["index"], documents, *sizes, runs=runs, images=images)
    return {**counts, "files": record_files(work["folder"], shard_names(work["index"]))}


def partly_unsorted(documents: int, share: float) -> npt.NDArray[np.int64]:
    """Places in the order, a ``share`` of them (whole blocks) drawn out, shuffled and put last."""
    blocks = -(-documents // BLOCK)
    drawn = np.zeros(blocks, dtype=bool)
    drawn[permute(np.arange(blocks), blocks, UNSORTED_KEY)[: round(share * blocks)]] = True
    loose = np.repeat(drawn, BLOCK)[:documents]
    rest = np.flatnonzero(loose)
    shuffled = rest[permute(np.arange(len(rest)), len(rest), UNSORTED_KEY)] if len(rest) else rest
    return np.concatenate([np.flatnonzero(~loose), shuffled])


def gather(folder: Path, parts: list[dict[str, Any]], order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[Any]]:
    """Tokens of the documents with the given numbers, through memory maps of the tokenised parts."""
    starts = np.cumsum([0, *(part["documents"] for part in parts)])

    @lru_cache(OPEN)
    def part(number: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        tokens, offsets = (folder / name for name in part_names(parts[number]["index"]))
        return np.memmap(tokens, dtype=parts[number]["dtype"], mode="r"), np.load(offsets, mmap_mode="r")

    for document in order.tolist():
        number = int(np.searchsorted(starts, document, side="right")) - 1
        tokens, offsets = part(number)
        row = document - int(starts[number])
        yield np.array(tokens[offsets[row] : offsets[row + 1]])  # a view would keep its file open

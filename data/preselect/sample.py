"""The documents that the ladder reads: so many of each of the most frequent domains (arXiv 2503.00808, section 3.1).

A document's place in the draw is a hash of the seed and its id, so the sample depends on the corpus alone, not on how
it was read. Equal texts are drawn once.
"""

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa

from conf.errors import DataError
from conf.schema import RunConfig
from data.documents import parquet_writer, read_batches, read_columns, row_writer
from data.manifest import Manifest
from data.preselect.exercises import item_rows
from data.stages import RunUnits, Stage, Unit, clear, collect_files, record_files, run_stage, unit

SAMPLE = pa.schema([(name, pa.string()) for name in ("id", "text", "source", "domain")] + [("place", pa.binary(16))])
ITEMS = "items.parquet"  # the built-in evaluation, read by the same models in the same way
READ = ["id", "text", "source", "url"]


def sample(config: RunConfig, corpus: Manifest, folder: Path, run_units: RunUnits) -> Manifest:
    """Draws ``{preselect.dir}/sample`` from the parts of ``corpus``, a stage whose files lie in ``folder``.

    Figures: ``parts`` (file, documents), ``domains`` (documents read and drawn by domain), ``documents``. Raises
    DataError when no document can be drawn.
    """
    settings = {
        name: getattr(config.preselect, name) for name in ("domain", "domains", "per_domain", "min_chars", "items")
    }
    settings |= {"seed": config.seed, "shard_documents": config.data.shard_documents}
    place = Path(config.preselect.dir).expanduser().absolute() / "sample"
    stage = Stage("preselect_sample", 1, place, settings, corpus, overwrite=config.data.overwrite)

    def body(stage: Stage) -> tuple[dict[str, Any], dict[str, Any]]:
        work = [{**settings, "source": str(folder), **part} for part in corpus.figures["parts"]]
        drawn = run_units("sample: draw", "data.preselect.sample:draw_unit", stage.units("draw", work))
        candidates = [result["file"] for result in drawn]
        counts = sum((Counter(result["counts"]) for result in drawn), Counter[str]())
        merge = stage.units("merge", [{**settings, "candidates": candidates, "counts": dict(sorted(counts.items()))}])
        merged = run_units("sample: merge", "data.preselect.sample:merge_unit", merge)[0]
        if not merged["documents"]:
            clear(place)
            value = f"{counts.total()} documents of at least {config.preselect.min_chars} characters"
            rule = "the ladder reads at least one document"
            raise DataError("preselect.min_chars", value, rule, "lower preselect.min_chars or use another corpus")
        for name in candidates:
            (place / name).unlink(missing_ok=True)
        return {key: merged[key] for key in ("parts", "documents", "domains")}, collect_files([merged])

    return run_stage(stage, body)


def domain_of(row: dict[str, Any], kind: str) -> str:
    """The name that groups a document: its source, or the host of its url (its source where it has none)."""
    if kind == "host" and (host := urlsplit(row["url"] or "").hostname):
        return host.removeprefix("www.")
    return row["source"] or ""


def place_of(seed: int, name: str) -> bytes:
    """Where a document stands in the draw: 16 bytes, uniform, its own."""
    return hashlib.blake2b(f"{seed}\0{name}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _rows(work: Unit) -> Iterator[dict[str, Any]]:
    left = work["documents"]
    for batch in read_batches(Path(work["source"]) / work["file"], READ):
        for row in batch.slice(0, left).to_pylist():
            if len(row["text"]) >= max(1, work["min_chars"]):
                yield row
        left -= batch.num_rows
        if left <= 0:
            return


@unit
def draw_unit(work: Unit) -> Unit:
    """Of one part, the first ``per_domain`` documents of each domain in the order of the draw, and all counts."""
    counts: Counter[str] = Counter()
    best: dict[str, list[tuple[int, str, dict[str, Any]]]] = {}
    for row in _rows(work):
        row["domain"] = domain_of(row, work["domain"])
        row["place"] = place_of(work["seed"], row["id"])
        counts[row["domain"]] += 1
        heap = best.setdefault(row["domain"], [])
        entry = (-int.from_bytes(row["place"]), row["id"], row)  # a heap of the largest places
        if len(heap) < work["per_domain"]:
            heapq.heappush(heap, entry)
        elif entry > heap[0]:
            heapq.heapreplace(heap, entry)
    name = f"candidates/{Path(work['file']).name}"
    with row_writer(Path(work["folder"]) / name, SAMPLE) as rows:
        for _, _, row in sorted((entry for heap in best.values() for entry in heap), key=lambda e: (-e[0], e[1])):
            rows.add({key: row[key] for key in SAMPLE.names}, len(row["text"]))
    return {"file": name, "counts": dict(sorted(counts.items())), "files": record_files(work["folder"], [name])}


@unit
def merge_unit(work: Unit) -> Unit:
    """The draw over all parts, written in shards; memory holds one place, domain and text hash a candidate."""
    folder = Path(work["folder"])
    ranked = sorted(work["counts"].items(), key=lambda item: (-item[1], item[0]))
    wanted = {name for name, _ in (ranked[: work["domains"]] if work["domains"] else ranked)}
    heads: list[tuple[bytes, str, int, int]] = []
    for number, name in enumerate(work["candidates"]):
        table = read_columns(folder / name, ["place", "domain"])
        pairs = zip(table["place"].to_pylist(), table["domain"].to_pylist(), strict=True)
        heads += [(place, domain, number, row) for row, (place, domain) in enumerate(pairs) if domain in wanted]
    taken, chosen = Counter[str](), set[tuple[int, int]]()
    for _, domain, number, row in sorted(heads):
        if taken[domain] < work["per_domain"]:
            taken[domain] += 1
            chosen.add((number, row))
    parts, drawn = _write_shards(work, chosen)
    domains = {name: {"documents": count, "drawn": drawn[name]} for name, count in ranked[:1000] if name in wanted}
    with parquet_writer(folder / ITEMS, SAMPLE) as writer:
        writer.write_table(pa.Table.from_pylist(item_rows(work["items"], work["seed"]), schema=SAMPLE))
    files = record_files(folder, [ITEMS, *(part["file"] for part in parts)])
    return {"parts": parts, "documents": drawn.total(), "domains": domains, "files": files}


def _write_shards(work: Unit, chosen: set[tuple[int, int]]) -> tuple[list[Unit], Counter[str]]:
    """Writes the chosen rows, each text once, as parts of ``shard_documents`` rows; counts them by domain."""
    folder, size = Path(work["folder"]), work["shard_documents"]
    seen, drawn = set[bytes](), Counter[str]()

    def rows() -> Iterator[dict[str, Any]]:
        for number, name in enumerate(work["candidates"]):
            place = 0
            for batch in read_batches(folder / name, SAMPLE.names):
                for row in batch.to_pylist():
                    key = hashlib.blake2b(row["text"].encode("utf-8", "surrogatepass"), digest_size=16).digest()
                    if (number, place) in chosen and key not in seen:
                        seen.add(key)
                        drawn[row["domain"]] += 1
                        yield row
                    place += 1

    parts: list[Unit] = []
    stream = rows()
    while (first := next(stream, None)) is not None:
        name = f"part-{len(parts):05d}.parquet"
        with row_writer(folder / name, SAMPLE) as writer:
            writer.add(first, len(first["text"]))
            while writer.count < size and (row := next(stream, None)) is not None:
                writer.add(row, len(row["text"]))
        parts.append({"file": name, "documents": writer.count})
    return parts, drawn

"""datatrove's filters, MinHash and fastText filter on a JSONL file, run by benchmarks/curate.py with its Python.

Prints one JSON object: documents per CPU second by task, and by document what the filters decided and what the model
at the second path says.
"""

import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

from datatrove.data import Document  # pyright: ignore[reportMissingImports]
from datatrove.executor.local import LocalPipelineExecutor  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.dedup import (  # pyright: ignore[reportMissingImports]
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.filters import (  # pyright: ignore[reportMissingImports]
    C4QualityFilter,
    FastTextClassifierFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.readers import JsonlReader  # pyright: ignore[reportMissingImports]
from datatrove.pipeline.writers import JsonlWriter  # pyright: ignore[reportMissingImports]
from loguru import logger  # pyright: ignore[reportMissingImports]


def filters(rows: list[dict[str, str]]) -> tuple[float, dict[str, list[str]]]:
    """CPU seconds; reasons by id, in FineWeb's order, the last text that C4 left going on to FineWeb's rules."""
    chain = {
        "repetition": GopherRepetitionFilter(),
        "gopher": GopherQualityFilter(),
        "c4": C4QualityFilter(filter_no_terminal_punct=False),
        "fineweb": FineWebQualityFilter(),
    }
    next(iter(chain.values())).filter(Document(text="Load the tokenizer before the clock starts.", id="warm"))
    decisions: dict[str, list[str]] = {}
    start = time.process_time()
    for row in rows:
        document, found = Document(text=row["text"], id=row["id"]), []
        for name, step in chain.items():
            if name == "fineweb" and "c4" in found:
                continue
            if step.filter(document) is not True:
                found.append(name)
        decisions[row["id"]] = found
    return time.process_time() - start, decisions


def scores(rows: list[dict[str, str]], model: str) -> tuple[float, dict[str, float]]:
    """CPU seconds of the filter on documents in memory; the probability of label 1 by id."""
    step = FastTextClassifierFilter(model, keep_labels=("1", 0.5), newline_replacement=" ")
    step.filter(Document(text="Load the model before the clock starts.", id="warm"))
    documents = [Document(text=row["text"], id=row["id"]) for row in rows]
    start = time.process_time()
    for document in documents:
        step.filter(document)
    seconds = time.process_time() - start
    return seconds, {document.id: document.metadata["__label__1"] for document in documents}


def minhash(source: Path, root: Path) -> tuple[float, list[str]]:
    """CPU seconds of the four stages in this process; ids that stay."""
    config = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8)
    reader = JsonlReader(str(source.parent), glob_pattern=source.name)
    stages = [
        [reader, MinhashDedupSignature(str(root / "signatures"), config=config)],
        [MinhashDedupBuckets(str(root / "signatures"), str(root / "buckets"), config=config)],
        [MinhashDedupCluster(str(root / "buckets"), str(root / "remove"), config=config)],
        [reader, MinhashDedupFilter(str(root / "remove")), JsonlWriter(str(root / "kept"), compression=None)],
    ]
    start = time.process_time()
    for number, pipeline in enumerate(stages):
        tasks = config.num_buckets if number == 1 else 1  # as many as its second stage wants, one after another
        LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(root / f"logs{number}")).run()
    seconds = time.process_time() - start
    kept = [json.loads(line)["id"] for path in (root / "kept").glob("*.jsonl") for line in path.open()]
    return seconds, kept


def main() -> None:
    logger.remove()
    source = Path(sys.argv[1])
    rows = [json.loads(line) for line in source.open()]
    root = Path(tempfile.mkdtemp())
    try:
        seconds, decisions = filters(rows)
        scoring, probabilities = scores(rows, sys.argv[2])
        hashing, kept = minhash(source, root)
    finally:
        shutil.rmtree(root)
    rates = {"filters": len(rows) / seconds, "minhash": len(rows) / hashing, "fastText": len(rows) / scoring}
    print(json.dumps({"rates": rates, "decisions": decisions, "kept": kept, "scores": probabilities}))


if __name__ == "__main__":
    main()

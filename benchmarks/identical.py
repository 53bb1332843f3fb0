"""One page again and again: CPU seconds and memory of curation and order at a tenth and at the whole of a number.

    python -m benchmarks.identical [--documents 1000000] [--stages curate order]

Half of the documents are equal, the others have a line of their own, so that only MinHash can tell what they are.
``curate`` drops all but one by exact and near duplicates; ``order`` lays out all of them, none dropped. Each runs in a
process of its own, its units one after another. What is linear takes ten times as long for ten times the documents.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from conf.curate import CurationConfig
from conf.schema import RunConfig
from data.curate import curate
from data.order import order
from data.stages import serial_units

PAGE = "\n".join(
    f"Paragraph {number} of the page that a crawler met again and again, about rivers and the year {1900 + number}."
    for number in range(5)
)


def write_pages(path: Path, documents: int) -> None:
    """JSON lines: every second document is the page itself, the others have a line more."""
    with path.open("w") as file:
        for number in range(documents):
            text = PAGE if number % 2 else f"{PAGE}\nVisitor {number}."
            file.write(json.dumps({"id": f"d{number}", "text": text}) + "\n")


def settings(corpus: Path, root: Path) -> RunConfig:
    config = RunConfig(name="identical", run_dir=str(root / "run"))
    config.data.source, config.data.path, config.data.dir = "path", str(corpus), str(root / "data")
    config.curation = CurationConfig(1, 0, 0, 0.0, 0.0, 0.0)
    return config


def curated(corpus: Path, root: Path) -> dict[str, Any]:
    """Duplicates dropped; what went, by reason."""
    config = settings(corpus, root)
    config.curation.minhash.enabled = True
    figures = curate(config, serial_units).figures
    return {"kept": figures["kept"], **figures["dropped"], **figures["near_pairs"]}


def ordered(corpus: Path, root: Path) -> dict[str, Any]:
    """Nothing dropped by curation: the order meets all copies."""
    config = settings(corpus, root)
    config.curation.deduplicate = False
    curate(config, serial_units)
    figures = order(config, serial_units).figures
    return {name: figures[name] for name in ("documents", "isolated", "near_duplicates") if name in figures}


STAGES = {"curate": curated, "order": ordered}


def measured(connection: Any, work: str, corpus: Path, root: Path) -> None:
    """In a process of its own: the work, its CPU seconds and the most memory."""
    start = time.process_time()
    found = STAGES[work](corpus, root)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send((found, time.process_time() - start, peak / 1024))


def main() -> None:
    """Both stages at both sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=1_000_000)
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    for work in arguments.stages:
        for documents in (arguments.documents // 10, arguments.documents):
            with tempfile.TemporaryDirectory() as scratch:
                corpus = Path(scratch) / "pages.jsonl"
                write_pages(corpus, documents)
                here, there = context.Pipe()
                process = context.Process(target=measured, args=(there, work, corpus, Path(scratch)))
                process.start()
                there.close()
                found, seconds, peak = here.recv()
                process.join()
            print(f"{work:7s}{documents:>10,} documents {seconds:8.1f} CPU s {peak:8.0f} MiB; {found}", flush=True)


if __name__ == "__main__":
    main()

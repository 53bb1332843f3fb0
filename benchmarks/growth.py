"""Memory of curate, order and pack at a tenth and at the whole of a number of documents, phase by phase.

    python -m benchmarks.growth [--documents 100000]

Documents of 250 made-up words, half of them of one of many topics, so that few are near duplicates. Each size runs in a
process of its own, its units one after another as in one worker, so what a unit leaves behind is seen by the next.
Printed is the most memory of the process in each phase, without mapped files: what does not grow from the first size to
the second does not depend on the corpus.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.identical import settings
from data.curate import curate
from data.order import order
from data.pack import pack
from data.stages import Unit, serial_units

POLL_SEC = 0.005
WORDS, TOPIC, VOCABULARY = 250, 300, 20_000  # of a document, of a topic, of all


def write_documents(path: Path, documents: int) -> None:
    """JSON lines."""
    chance = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(chance.choices(letters, k=chance.randint(2, 9))) for _ in range(VOCABULARY)]
    topics = [chance.sample(words, TOPIC) for _ in range(max(8, documents // 40))]
    with path.open("w") as file:
        for number in range(documents):
            half = chance.choices(chance.choice(topics), k=WORDS // 2)
            text = " ".join(half + chance.choices(words, k=WORDS - WORDS // 2))
            file.write(json.dumps({"id": f"d{number}", "text": text}) + "\n")


def own_memory() -> int:
    """Bytes of this process in memory that are no mapped file's."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Peaks:
    """Runs units; the most memory of each phase."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._label = ""
        threading.Thread(target=self._poll, daemon=True).start()

    def _poll(self) -> None:
        while True:
            self._see()
            time.sleep(POLL_SEC)

    def _see(self) -> None:
        if label := self._label:
            self.peaks[label] = max(self.peaks.get(label, 0), own_memory())

    def run(self, label: str, function: str, units: list[Unit]) -> list[Unit]:
        self._label = label
        results = serial_units(label, function, units)
        self._see()
        self._label = ""
        return results


def measured(connection: Any, corpus: Path, root: Path) -> None:
    """In a process of its own: all three stages; the peaks."""
    config, peaks = settings(corpus, root), Peaks()
    config.data.context = 512
    curate(config, peaks.run)
    order(config, peaks.run)
    pack(config, peaks.run)
    connection.send(peaks.peaks)


def main() -> None:
    """Both sizes, a line for each phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=100_000)
    documents = parser.parse_args().documents
    context, found = multiprocessing.get_context("spawn"), []
    for size in (documents // 10, documents):
        with tempfile.TemporaryDirectory() as scratch:
            corpus = Path(scratch) / "documents.jsonl"
            write_documents(corpus, size)
            here, there = context.Pipe()
            process = context.Process(target=measured, args=(there, corpus, Path(scratch)))
            process.start()
            there.close()  # so that the end of a process that fails is seen
            found.append(here.recv())
            process.join()
    print(f"{'MiB without mapped files':28s}{documents // 10:>10,}{documents:>10,}   bytes a document")
    for label, peak in found[1].items():
        grown = f"{(peak - found[0][label]) / (documents * 0.9):>8,.0f}" if label in found[0] else ""
        print(f"{label:28s}{found[0].get(label, 0) / 2**20:>10,.0f}{peak / 2**20:>10,.0f}{grown:>11s}")


if __name__ == "__main__":
    main()

"""One config in one process, on a local Ray and on a Ray of two nodes: the same files, byte for byte.

    python -m benchmarks.same [--documents 400]

Curation, order and packing of ``benchmarks.crash``, each in a folder of its own; the nodes are raylets of one CPU each
beside a head without any, and two units run at a time. Manifests are compared without date and folder.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.crash import PROCESSES, STAGES, drive, make_corpus, settings
from benchmarks.nodes import Nodes
from cluster.connection import connect
from conf.schema import ClusterConfig
from data.stages import serial_units
from tests.helpers.stage_files import stage_files


def in_this_process(root: Path, corpus: Path) -> None:
    for stage in STAGES:
        stage(settings(root, corpus), serial_units)


def on_cluster(address: str, root: Path, corpus: Path) -> None:
    """A driver in a process of its own, as Ray connects a process once."""
    driver = PROCESSES.Process(target=drive, args=(address, root, corpus, root.with_suffix(".log"), STAGES))
    driver.start()
    driver.join()
    assert driver.exitcode == 0, f"the driver on {address} ended with {driver.exitcode}"


def on_local_ray(root: Path, corpus: Path) -> None:
    with connect(ClusterConfig(object_store_mb=128)) as connection:
        on_cluster(connection.address, root, corpus)


def on_two_nodes(root: Path, corpus: Path) -> None:
    with Nodes(2, 1) as nodes:
        on_cluster(nodes.address, root, corpus)


PLACES: dict[str, Callable[[Path, Path], None]] = {
    "one process": in_this_process,
    "local Ray": on_local_ray,
    "two nodes": on_two_nodes,
}


def main() -> None:
    """Runs everywhere and prints what differs from the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=400)
    arguments = parser.parse_args()
    expected: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus", arguments.documents)
        for name, run in PLACES.items():
            start, root = time.monotonic(), Path(folder) / name.replace(" ", "-")
            run(root, corpus)
            found = stage_files(root)
            expected = expected or found
            different = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
            print(
                f"{name:12s} {time.monotonic() - start:6.0f} s, {len(found)} files, {len(different)} differ", flush=True
            )
            assert not different, different[:5]


if __name__ == "__main__":
    main()

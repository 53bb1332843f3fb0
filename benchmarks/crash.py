"""Kills: workers and drivers of the data stages die at random moments, and the same command goes on.

    python -m benchmarks.crash [--kills 200] [--documents 1600] [--folder DIR]

A run is curate, order and pack over many small units, on a Ray cluster that outlives its drivers. At random moments a
process that has a unit in hand, or the driver, gets SIGKILL; a dead driver is started again until the run is complete.
Every complete run must equal an undisturbed one byte for byte (so no document is lost or there twice), then the next
one begins in an empty folder. Counted are units that were begun more than once, and files that appeared between a
driver's death and its successor. With ``--folder`` a benchmark that is stopped goes on after the last complete run.
"""

import argparse
import fcntl
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from cluster.connection import connect
from cluster.names import resolve
from cluster.pipeline import run_units
from conf.schema import ClusterConfig, RunConfig
from data.curate import curate
from data.fence import OWNER
from data.files import write_atomic
from data.order import order
from data.pack import pack
from tests.helpers.stage_files import stage_files
from tests.unit.data.samples import make_config, text

PROCESSES = multiprocessing.get_context("forkserver")  # drivers that start at once, as all is imported already
PROCESSES.set_forkserver_preload([__name__])
Stage = Callable[..., Any]
STAGES: tuple[Stage, ...] = (curate, order, pack)
RUN_TIMEOUT_SEC = 4 * 3600.0  # on a busy machine too
LONGEST_WAIT_SEC = 0.6  # between two kills
DRIVER_SHARE = 0.05  # of the kills
KILLS_A_RUN = 25  # at most; the rest of the run goes undisturbed


@dataclass
class Tally:
    """What was done and seen."""

    workers: int  # of a stage
    killed_workers: int = 0
    killed_drivers: int = 0
    gave_up: int = 0  # drivers that ended because one unit died too often
    runs: int = 0
    redone: int = 0
    late: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.killed_workers + self.killed_drivers

    @property
    def allowed(self) -> int:
        """Units that may have been begun again: one a worker and kill; a driver's end is that of all its workers."""
        return self.killed_workers + self.workers * (self.killed_drivers + self.gave_up)


def make_corpus(folder: Path, documents: int) -> Path:
    """Text files, some of them equal."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(documents):
        same = number - (number % 9 == 1)  # every ninth repeats the one before
        (folder / f"{number:05d}.txt").write_text(text(f"topic {same % 37} and {same % 11}", same, 30))
    return folder


def settings(root: Path, corpus: Path) -> RunConfig:
    """A run of many units: eight slices of the corpus, near duplicates, a partitioned order, shards."""
    config = make_config(root, corpus, shard_documents=max(1, sum(1 for _ in corpus.iterdir()) // 8))
    config.curation.minhash.enabled = config.curation.pii.enabled = True
    config.order.partitions = 4
    return config


def counted_unit(work: dict[str, Any]) -> dict[str, Any]:
    """Runs a unit in a worker, and notes it before and after if it is not done already."""
    inner, name = work["unit"], work["function"]
    markers = [step["marker"] for step in inner.get("steps", [inner])]
    new = not all(Path(marker).exists() for marker in markers)
    note = partial(_note, Path(work["log"]), [os.getpid(), markers[0]])
    if new:
        note("begun")
    result = resolve(name)(inner)
    if new:
        note("done")
    return result


def _note(log: Path, about: list[Any], what: str) -> None:
    with log.open("a") as file:
        file.write(json.dumps([what, *about]) + "\n")


def drive(address: str, root: Path, corpus: Path, log: Path, stages: Sequence[Stage]) -> None:
    """The driver's process: the stages one after another."""
    import ray

    cluster = ClusterConfig(workers=2)
    ray.init(address, log_to_driver=False, logging_level=logging.ERROR)

    def execute(label: str, function: str, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
        wrapped = [{"unit": unit, "function": function, "log": str(log), "name": label} for unit in units]
        return run_units(cluster, label, "benchmarks.crash:counted_unit", wrapped)

    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - Ray says at length that it is being killed
    for stage in stages:
        stage(settings(root, corpus), execute)


def read_log(log: Path) -> Iterator[tuple[str, int, str]]:
    """What workers noted; a line that a kill has cut is left out."""
    for line in log.read_text().splitlines() if log.exists() else ():
        with suppress(ValueError):
            what, pid, marker = json.loads(line)
            yield what, pid, marker


def busy(log: Path) -> list[int]:
    """Live processes with a unit in hand."""
    state: dict[int, str] = {}
    for what, pid, _ in read_log(log):
        state[pid] = what
    return [pid for pid, what in state.items() if what == "begun" and Path(f"/proc/{pid}").exists()]


def settled(root: Path) -> dict[str, tuple[int, int]]:
    """Files that are visible, by name, once no rename is under way."""
    for owner in root.rglob(OWNER):
        with owner.open() as file:
            fcntl.flock(file, fcntl.LOCK_EX)
    status = {str(path): path.stat() for path in sorted(root.rglob("[!.]*")) if path.is_file()}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in status.items()}


def disturbed_run(
    address: str, root: Path, corpus: Path, kills: int, chance: random.Random, tally: Tally, stages: Sequence[Stage]
) -> None:
    """One run to its end, with kills on the way until ``kills`` have been made in all."""
    log, before = root.with_suffix(".log"), None
    deadline = time.monotonic() + RUN_TIMEOUT_SEC
    while True:
        assert time.monotonic() < deadline, f"a run did not end; {tally}"
        if before is not None:
            after = settled(root)
            tally.late += [name for name in after if after[name] != before.get(name)]
        driver = PROCESSES.Process(target=drive, args=(address, root, corpus, log, stages))
        driver.start()
        noted = log.stat().st_size if log.exists() else 0
        while driver.is_alive() and tally.kills < kills:
            driver.join(chance.uniform(0.05, LONGEST_WAIT_SEC))
            if not log.exists() or log.stat().st_size == noted:
                continue  # a driver that has begun nothing yet would be killed in vain
            if driver.is_alive() and chance.random() < DRIVER_SHARE:
                driver.kill()
                tally.killed_drivers += 1
            elif driver.is_alive() and (pids := busy(log)):
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), signal.SIGKILL)
                    tally.killed_workers += 1
        driver.join()
        if driver.exitcode == 0:
            break
        tally.gave_up += driver.exitcode != -signal.SIGKILL
        before = settled(root)
    begun = Counter(marker for what, _, marker in read_log(log) if what == "begun")
    tally.redone += begun.total() - len(begun)
    tally.runs += 1


def crash(
    address: str, folder: Path, kills: int, documents: int, seed: int = 0, stages: Sequence[Stage] = STAGES
) -> Tally:
    """Runs until ``kills`` processes have been killed; compares every run with an undisturbed one."""
    corpus, state, tally = folder / "corpus", folder / "tally.json", Tally(workers=2)
    if state.exists():
        tally = Tally(**json.loads(state.read_text()))
    else:
        make_corpus(corpus, documents)
        disturbed_run(address, folder / "undisturbed", corpus, 0, random.Random(seed), tally, stages)
        write_atomic(state, json.dumps(asdict(tally)))
    expected = stage_files(folder / "undisturbed")
    while tally.kills < kills:
        root = folder / f"run{tally.runs}"
        shutil.rmtree(root, ignore_errors=True)  # of a benchmark that was stopped
        root.with_suffix(".log").unlink(missing_ok=True)
        most = min(kills, tally.kills + KILLS_A_RUN)
        disturbed_run(address, root, corpus, most, random.Random(f"{seed}/{tally.runs}"), tally, stages)
        found = stage_files(root)
        tally.different += [name for name in {*found, *expected} if found.get(name) != expected.get(name)]
        shutil.rmtree(root)
        write_atomic(state, json.dumps(asdict(tally)))
    return tally


def main() -> None:
    """Kills and prints the tally; the exit code says whether all held."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--documents", type=int, default=1600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="of the runs, kept; without it a temporary one")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch, connect(ClusterConfig(object_store_mb=128)) as connection:
        folder = options.folder or Path(scratch)
        tally = crash(connection.address, folder, options.kills, options.documents, options.seed)
    killed = f"{tally.killed_workers} workers and {tally.killed_drivers} drivers killed"
    print(f"{killed} in {tally.runs - 1} runs; {tally.gave_up} drivers gave up on a unit that died four times")
    print(f"units begun again: {tally.redone} (at most {tally.allowed} allowed)")
    print(f"files that appeared after their driver's death: {len(tally.late)} {tally.late[:3]}")
    print(f"files that differ from an undisturbed run: {len(tally.different)} {tally.different[:3]}")
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(bool(tally.late or tally.different or tally.redone > tally.allowed))


if __name__ == "__main__":
    main()

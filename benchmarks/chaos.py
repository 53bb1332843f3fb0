"""Chaos: one training run on a Ray cluster of several nodes, disturbed at random again and again, loses nothing.

``python -m benchmarks.chaos --rounds 30 --seed 0`` submits a run as a Ray job, does a random harm to it a round, waits
until it trains on by itself, repairs the machine (not the run), and prints what happened and how long it took. At the
end the loss of every step is compared, to the last bit, with a run that nothing happens to. Exit code 1: a round took
longer than its bound, a step is missing or there twice, or a loss differs.

With ``--folder`` the same command goes on where an earlier one stopped: after ``--at-once`` rounds (exit code 75, the
run itself checkpointed and ended), or when it was ended itself, with the round that it was in.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.harms import ANYWHERE, WITH_NETWORK, WITH_ROOT, Scene
from benchmarks.netns import Network, available
from benchmarks.nodes import Nodes
from benchmarks.submitted import BOUND_SEC, SMALL_RUN, Run, prepare
from cluster.supervisor import read_attempts
from conf.errors import EXIT_STOPPED, EXIT_TERMINATED
from data.files import write_atomic
from trainers.journal import METRICS_FILE, read_journal

DISK_MB = 64
SETTINGS = [*SMALL_RUN, "cluster.ranks=2", "cluster.placement=STRICT_SPREAD"]
PLAN, ROWS = "plan.json", "rounds.jsonl"  # in the folder: the harms of all rounds, and what came of them


def one_round(scene: Scene, number: int, kind: str) -> tuple[dict[str, Any], bool]:
    """Do one harm; return what is told of it, and whether the run came through."""
    harms, run = ANYWHERE | WITH_NETWORK | WITH_ROOT, scene.run
    row: dict[str, Any] = {"round": number, "harm": kind}
    replaced: list[int] = []
    try:
        run.await_step(run.step() + scene.dice.randint(11, 25), BOUND_SEC)  # a checkpoint lies between two harms
        attempts, gangs, at, begun = len(read_attempts(run.run_dir)), run.gangs(), run.step(), time.monotonic()
        row |= {"step": at, "what": harms[kind](scene)}
        run.meanwhile = lambda: replaced.extend(scene.nodes.restore())  # a raylet may die of a harm later on
        if kind in ANYWHERE:  # the others may pass without a restart
            run.await_gang(gangs + 1, BOUND_SEC)
        run.await_step(at + 1, BOUND_SEC)
        row["sec"] = round(time.monotonic() - begun, 1)
        replaced.extend(scene.nodes.repair())
    except RuntimeError as error:
        print(error, file=sys.stderr, flush=True)
        return row | {"log": str(error)}, False
    finally:
        run.meanwhile = lambda: None
    row["replaced"] = ",".join(map(str, replaced)) or "-"
    events = [record for record in read_attempts(run.run_dir)[attempts:] if record["event"] != "started"]
    told = "; ".join(f"{e['event']}: {e.get('message', '')}"[:70] for e in events)
    row["log"] = told or ("the command was run again" if run.gangs() > gangs else "trained on")
    return row, True


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    columns = ("round", "harm", "what", "step", "sec", "replaced", "log")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(row.get(column, "")) for column in columns))
    Console(width=180).print(table, highlight=False)


def compare(disturbed: Run, undisturbed: Run) -> str:
    """What is wrong with the losses of the disturbed run; empty: nothing, to the last bit."""
    found, expected = disturbed.losses(), undisturbed.losses()
    lines = [record["step"] for record in read_journal(disturbed.run_dir / METRICS_FILE)]
    if lines != list(range(1, len(lines) + 1)):
        return "steps are missing or there twice"
    differing = [step for step, loss in found.items() if expected.get(step) != loss]
    return f"{len(differing)} losses differ, the first after step {differing[0]}" if differing else ""


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of its own for the run (root), so that filling it harms nobody else; what is in it is kept."""
    disk, kept = folder / "disk", folder / "kept"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)], check=True)
    try:
        if kept.exists():
            shutil.copytree(kept, disk, dirs_exist_ok=True)
        yield
    finally:
        beside = folder / "kept.new"
        shutil.rmtree(beside, ignore_errors=True)
        shutil.copytree(disk, beside)
        shutil.rmtree(kept, ignore_errors=True)
        beside.rename(kept)
        subprocess.run(["umount", "-l", str(disk)], check=True)


def plan_of(folder: Path, options: argparse.Namespace) -> list[str]:
    """The harm of every round, drawn once: later calls with the folder find it there."""
    path = folder / PLAN
    if not path.exists():
        kinds = list(ANYWHERE if options.plain or available() else ANYWHERE | WITH_NETWORK | WITH_ROOT)
        dice, times = random.Random(options.seed), -(-options.rounds // len(kinds))
        drawn = [kind for _ in range(times) for kind in dice.sample(kinds, len(kinds))]
        write_atomic(path, json.dumps({"seed": options.seed, "kinds": drawn[: options.rounds]}) + "\n")
    plan = json.loads(path.read_text())
    if (plan["seed"], len(plan["kinds"])) != (options.seed, options.rounds):
        sys.exit(f"{path} is of {len(plan['kinds'])} rounds with seed {plan['seed']}: name another --folder")
    return plan["kinds"]


def disturb(scene: Scene, plan: list[str], rows: list[dict[str, Any]], until: int, seed: int) -> bool:
    """Do the rounds after those in ``rows``, up to ``until``; return whether the run came through."""
    if len(rows) == until:
        return True
    scene.run.start()
    for number in range(len(rows) + 1, until + 1):
        scene.dice = random.Random(f"{seed}-{number}")
        row, fine = one_round(scene, number, plan[number - 1])
        print(json.dumps(row), flush=True)
        if not fine:
            show([*rows, row])
            return False
        rows.append(row)
        with (scene.run.folder / ROWS).open("a") as file:
            file.write(json.dumps(row) + "\n")
    code = scene.run.stop()
    print(f"{len(rows)} rounds, {scene.run.step()} steps, stopped with exit code {code}", flush=True)
    return code == EXIT_STOPPED


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="no network namespaces, no mounts, also as root")
    parser.add_argument("--folder", type=Path, help="keep everything here and go on from what is there")
    parser.add_argument("--at-once", type=int, default=0, help="do so many rounds of them now (default: all)")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_TERMINATED))  # nodes and mounts are not left behind
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        plan = plan_of(folder, options)
        rows = read_journal(folder / ROWS)
        settings = [*SETTINGS, f"data.path={folder}/corpus"]
        prepare(folder, settings)
        networked = bool(set(plan) & set(WITH_NETWORK))
        if networked:
            stack.enter_context(small_disk(folder))
        network = stack.enter_context(Network("port", 3, 1000)) if networked else None
        nodes = stack.enter_context(Nodes(2, 1, network))
        print(f"rounds {len(rows) + 1} to {len(plan)}, seed {options.seed}, {'three hosts' if network else 'one host'}")
        disturbed, undisturbed = (Run(name, folder, nodes, settings) for name in ("disturbed", "undisturbed"))
        until = min(len(plan), len(rows) + options.at_once) if options.at_once else len(plan)
        if not disturb(Scene(disturbed, nodes, network, random.Random()), plan, rows, until, options.seed):
            return 1
        if until < len(plan):
            return EXIT_STOPPED
        show(rows)
        last = disturbed.step()
        shutil.rmtree(undisturbed.run_dir, ignore_errors=True)  # of a call that was ended meanwhile
        undisturbed.start()
        undisturbed.await_step(last, 3600.0)
        undisturbed.stop()
        wrong = compare(disturbed, undisturbed)
        print(f"losses of steps 1 to {last}: {wrong or 'equal to the undisturbed run to the last bit'}")
        return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

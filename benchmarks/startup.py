"""What Ray costs a run: the time from the command to the first step, and the step beside bare torchrun's.

    python -m benchmarks.startup [--quick] [--json FILE]

A cluster of one node runs on this machine before the first command, as one that people share. ``sundog train`` with
two ranks is then started again and again, in turn with the same config under torchrun; both write the same metrics.
Start-up is the time from the command until its first step is recorded. ``--quick``: fewer steps and
turns.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.nodes import Nodes
from benchmarks.submitted import ROOT, SMALL_RUN, prepare
from benchmarks.table import arguments, compare, median_ratio, report
from data.files import write_atomic
from launch.preflight import dump, load_config
from trainers.journal import METRICS_FILE, read_journal

RANKS, TIMEOUT_SEC = 2, 300.0
WARM_UP = 3  # steps that are not counted
START_SEC, OVERHEAD = 12.0, 0.02  # that are asked for
MODEL = [
    "model.dim=256",
    "model.layers=4",
    "model.heads=8",
    "model.kv_heads=4",
    "trainer.batch=8",
    "trainer.micro_batch=4",
]


def _settings(folder: Path, name: str, steps: int) -> list[str]:
    places = [f"name={name}", f"run_dir={folder}/{name}", f"data.path={folder}/corpus", f"data.dir={folder}/data"]
    ends = [f"trainer.steps={steps}", "trainer.checkpoint_every=1000", f"cluster.ranks={RANKS}"]
    return [*SMALL_RUN, *MODEL, *places, *ends]


def _timed(command: list[str], nodes: Nodes, run_dir: Path) -> tuple[float, list[float]]:
    """(seconds to the first step, seconds of the steps after the warm-up)."""
    begun, first = time.monotonic(), 0.0
    environment = nodes.environment | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if not first and read_journal(run_dir / METRICS_FILE):
                first = time.monotonic() - begun
            if time.monotonic() - begun > TIMEOUT_SEC:
                process.kill()
            time.sleep(0.02 if not first else 0.5)
        log.seek(0)
        if process.returncode != 0:
            sys.exit(f"{' '.join(command)}\n{log.read().decode(errors='replace')[-3000:]}")
    steps = [record["time/step_sec"] for record in read_journal(run_dir / METRICS_FILE)]
    return first, steps[WARM_UP:]


def _gang(settings: list[str], nodes: Nodes) -> list[str]:
    return [sys.executable, "-m", "launch", "train", *settings, f"cluster.address={nodes.address}"]


def _torchrun(settings: list[str], run_dir: Path) -> list[str]:
    write_atomic(run_dir / "config.yaml", dump(load_config(settings)))
    run = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={RANKS}", "--standalone"]
    return [*run, "-m", "trainers.pretrain", "--config", str(run_dir / "config.yaml")]


def main() -> None:
    chosen = arguments("What Ray costs a run.")
    turns, steps = (1, 20) if chosen.quick else (3, 40)
    started: dict[str, list[float]] = {"gang": [], "torchrun": []}
    step: dict[str, list[float]] = {"gang": [], "torchrun": []}
    with tempfile.TemporaryDirectory(prefix="startup-") as place, Nodes(1, RANKS) as nodes:
        folder = Path(place)
        prepare(folder, [*SMALL_RUN, f"data.path={folder}/corpus"])
        for turn in range(turns):
            for kind in ("gang", "torchrun") if turn % 2 else ("torchrun", "gang"):
                settings = _settings(folder, f"{kind}-{turn}", steps)
                run_dir = folder / f"{kind}-{turn}"
                command = _gang(settings, nodes) if kind == "gang" else _torchrun(settings, run_dir)
                first, seconds = _timed(command, nodes, run_dir)
                started[kind].append(first)
                step[kind].append(statistics.median(seconds))
                print(
                    f"turn {turn + 1}: {kind:<8} first step after {first:5.1f} s, a step {step[kind][-1]:.4f} s",
                    flush=True,
                )
    first, bare = (statistics.median(started[kind]) for kind in ("gang", "torchrun"))
    overhead = 1 / median_ratio(step["gang"], step["torchrun"]) - 1
    rows = [
        compare("command to first step", "s", first, bare, "torchrun"),
        compare("a step", "s", statistics.median(step["gang"]), statistics.median(step["torchrun"]), "torchrun"),
    ]
    notes = [
        f"start-up on a running cluster {first:.1f} s, {START_SEC:g} s are allowed: {_verdict(first <= START_SEC)}",
        f"step of the gang {overhead:+.1%} of torchrun's, {OVERHEAD:.0%} is allowed: {_verdict(overhead <= OVERHEAD)}",
    ]
    report(rows, chosen.json, f"{RANKS} ranks on one machine, medians of {turns} turns", notes)


def _verdict(fine: bool) -> str:
    return "reached" if fine else "missed"


if __name__ == "__main__":
    main()

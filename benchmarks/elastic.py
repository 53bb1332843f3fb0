"""Elastic training: a run loses a node and goes on with fewer ranks, gets it back and grows, and no loss changes.

    python -m benchmarks.elastic

One run of two ranks on a Ray cluster of two nodes on this machine. A node is killed and stays away: the run must go
on with the ranks that are left. Later the node comes back: the run must grow at its next checkpoint. The expectation is
a run that nobody disturbs and that is given the same numbers of ranks at the same steps by command; the losses of both
are compared to the last bit, and with a run of one number of ranks throughout, from which rounding alone may part them:
the global batch and the order of the windows do not depend on the number of ranks. Exit code 1: any of this failed.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.nodes import Nodes
from benchmarks.submitted import BOUND_SEC, ROOT, SMALL_RUN, Run, prepare
from cluster.supervisor import read_attempts
from trainers.journal import METRICS_FILE, read_journal

NODES, STEPS = 2, 15  # of one rank each; steps between two events, at least
ROUNDING = 1e-4
RESUMED = re.compile(r"\d+ dp x \d+ cp ranks.*(?:resuming after step (\d+)|from step 0)")
SETTINGS = [*SMALL_RUN, "trainer.min_lr_fraction=1.0"]  # a rate that does not depend on trainer.steps


def disturbed(run: Run, nodes: Nodes) -> list[tuple[int, int]]:
    """Take a node away and give it back; return (ranks, the step that a gang went on from) of every gang."""
    run.start()
    run.await_step(STEPS, BOUND_SEC)
    for what, ranks in ((nodes.kill, NODES - 1), (nodes.start, NODES)):
        gangs = run.gangs()
        what(NODES)
        run.await_gang(gangs + 1, BOUND_SEC)
        run.await_step(run.step() + STEPS, BOUND_SEC)
        print(f"{ranks} of {NODES} nodes: {len(run.ranks())} ranks at step {run.step()}", flush=True)
    run.stop()
    sizes = [len(record["ranks"]) for record in read_attempts(run.run_dir) if record["event"] == "started"]
    starts = [int(step or 0) for step in RESUMED.findall(run.log.read_text())]
    return list(zip(sizes, starts, strict=True))


def expected(name: str, plan: list[tuple[int, int]], last: int, run: Run, nodes: Nodes) -> dict[int, float]:
    """Losses of a run that is told how many ranks to have from which step on."""
    run_dir = run.folder / "disk" / name
    ends = [step for _, step in plan[1:]] + [last]
    for (ranks, _), end in zip(plan, ends, strict=True):
        settings = [*run.settings, f"name={name}", f"run_dir={run_dir}", f"data.dir={run.folder}/data"]
        settings += [f"cluster.ranks={ranks}", "cluster.min_ranks=0", f"trainer.steps={end}"]
        command = [sys.executable, "-m", "launch", "train", *settings, f"cluster.address={nodes.address}"]
        environment = nodes.environment | {"PYTHONPATH": str(ROOT)}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=BOUND_SEC, stdout=subprocess.DEVNULL)
    return {record["step"]: record["train/loss"] for record in read_journal(run_dir / METRICS_FILE)}


def problems(run: Run, plan: list[tuple[int, int]], same: dict[int, float], steady: dict[int, float]) -> list[str]:
    found = run.losses()
    steps = [record["step"] for record in read_journal(run.run_dir / METRICS_FILE)]
    wrong = []
    if [ranks for ranks, _ in plan] != [NODES, NODES - 1, NODES]:
        wrong.append(f"ranks of the gangs were {[ranks for ranks, _ in plan]}")
    if steps != list(range(1, len(steps) + 1)):
        wrong.append("steps are missing or there twice")
    differing = [step for step, loss in found.items() if same.get(step) != loss]
    if differing:
        wrong.append(f"{len(differing)} losses differ from the expectation, the first after step {differing[0]}")
    drift = max(abs(loss / steady[step] - 1) for step, loss in found.items())
    print(f"{len(found)} steps; from a run of {NODES} ranks throughout they differ by {drift:.1e} of the loss at most")
    return wrong + ([f"that is more than rounding, {ROUNDING:g}"] if drift > ROUNDING else [])


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="elastic-") as place, Nodes(NODES, 1) as nodes:
        folder = Path(place)
        elastic = [f"cluster.ranks={NODES}", f"cluster.min_ranks={NODES - 1}", "cluster.placement=SPREAD"]
        run = Run("elastic", folder, nodes, [*SETTINGS, f"data.path={folder}/corpus", *elastic])
        prepare(folder, run.settings)
        plan = disturbed(run, nodes)
        print("gangs: " + ", ".join(f"{ranks} ranks from step {step}" for ranks, step in plan), flush=True)
        last = run.step()
        same = expected("same", plan, last, run, nodes)
        steady = expected("steady", [(NODES, 0)], last, run, nodes)
        wrong = problems(run, plan, same, steady)
    print(
        "; ".join(wrong) or "every loss is that of the undisturbed run with the same numbers of ranks, to the last bit"
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

"""``sundog sweep KEY=A,B ...`` (or ``sundog train -m``): a Hydra multirun whose jobs are Ray jobs on one cluster.

Hydra's sweeper proposes the jobs (all combinations, or a search with ``hydra/sweeper=optuna``); this module runs a
batch of them side by side, each in a run folder of its own below ``runs/NAME``. A job that is done is not run again,
so the same command goes on with an interrupted sweep.
"""

import json
import re
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.errors import (
    EXIT_BUG,
    EXIT_DONE,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    EXIT_TERMINATED,
    ConfigError,
    SundogError,
)
from conf.rules import nearest
from conf.schema import RunConfig
from data.files import read_json, write_atomic
from launch.multirun import JobFailed, load_sweep, multirun
from launch.preflight import dump, load_config
from launch.room import Room
from launch.sweep_table import table
from trainers.journal import METRICS_FILE, read_journal
from trainers.metrics import METRICS, MINIMIZE, NEITHER

RESULTS, LOG = "sweep.json", "job.log"
POLL_SEC = 1.0
ERROR = re.compile(r"\w+ error: ")  # how a log tells of one, with a rule and a fix in the next lines
MESSAGE_LENGTH = 200
SIGNALLED = (EXIT_INTERRUPTED, EXIT_TERMINATED)  # of a job that a stop reached before it could checkpoint
MAX_THREADS = 256  # one a job that runs or waits for its turn
RIVALS = 2  # other jobs with a value at the same step, at least, before a loser is stopped
Run = Callable[[list[str], Path, Callable[[], int]], int]  # arguments, log file, stop requests -> exit code
Show = Callable[[Sequence["Job"]], None]


@dataclass
class Job:
    """One job of a sweep, as the table shows it and ``sweep.json`` keeps it."""

    label: str
    arguments: list[str]
    run_dir: str
    steps: int
    state: str = "waiting"  # then running; in the end done, failed, stopped, or pruned (a loser, stopped early)
    step: int = 0
    value: float | None = None  # newest value of the sweep's metric
    seconds: float = 0.0
    exit_code: int = EXIT_DONE
    message: str = ""
    variant: str = ""  # of sweep.variants; losers are told among jobs of the same one


class Sweep:
    """The task function that Hydra's launcher hands its batches to."""

    def __init__(
        self,
        config: RunConfig,
        fixed: Sequence[str],
        run: Run,
        *,
        room: Room,
        show: Show,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """``fixed`` names the keys and groups that are the same for all jobs; the others name the job. Each job runs
        when ``room`` has what its ranks need."""
        self.folder, self.jobs = Path(config.run_dir), list[Job]()
        self._config, self._settings, self._fixed = config, config.sweep, set(fixed)
        self._run, self._room, self._show, self._stop = run, room, show, stop
        self._sign = 1 if goal(config.sweep.metric) == MINIMIZE else -1
        self._configs: dict[str, RunConfig] = {}  # by run folder
        self._values: dict[str, dict[int, float]] = {}  # run folder -> step -> metric
        self._before = _recorded(self.folder / RESULTS)

    def batch(self, batch: Sequence[Sequence[str]]) -> list[float | Exception]:
        """Run jobs side by side, each proposal once with every variant; returns when all have ended.

        For each proposal its metric, the mean over the variants, or why it has none.
        """
        variants = self._settings.variants or [""]
        proposals = [[self._job(overrides, variant) for variant in variants] for overrides in batch]
        jobs = [job for proposal in proposals for job in proposal]
        self.jobs += jobs
        with ThreadPoolExecutor(min(len(jobs), MAX_THREADS), thread_name_prefix="sweep") as pool:
            running = [pool.submit(self._follow, job) for job in jobs]
            while not all(future.done() for future in running):
                self.refresh()
                time.sleep(POLL_SEC)
        for future in running:
            future.result()  # a bug in this module must not look like a failed job
        self.refresh()
        return [self._outcome(proposal) for proposal in proposals]

    def _job(self, proposal: Sequence[str], variant: str) -> Job:
        overrides = [*proposal, *variant.split()]
        own = [override for override in overrides if override.partition("=")[0] not in self._fixed]
        label = re.sub(r"[^\w.=,+-]+", "-", ",".join(own)) or "only"
        run_dir, name = str(self.folder / label), f"{self._config.name}-{label}"
        arguments = [*overrides, f"name='{name}'", f"run_dir='{run_dir}'", f"tracker.group='{self._config.name}'"]
        config = load_config(arguments)
        self._configs[run_dir] = config
        return Job(label, arguments, run_dir, config.trainer.steps, variant=variant)

    def _follow(self, job: Job) -> None:
        if self._same(job):
            if read_json(Path(job.run_dir) / "status.json").get("state") == "done":
                job.state, job.message = "done", "was done before"
                return
            before = self._before.get(job.run_dir, {})
            if before.get("state") == "pruned":
                job.state, job.message, job.seconds = "pruned", before["message"], before["seconds"]
                return
        try:
            need = self._room.need(self._configs[job.run_dir].cluster)
            with self._room.lend(need, self._stop) as lent:
                if not lent:
                    job.state = "stopped"
                    return
                self._do(job)
        except SundogError as error:
            job.state, job.message, job.exit_code = "failed", str(error), error.exit_code

    def _do(self, job: Job) -> None:
        job.state, start = "running", time.monotonic()
        job.exit_code = self._run(job.arguments, Path(job.run_dir) / LOG, lambda: self._wants_stop(job))
        if job.state == "pruned" and job.exit_code == EXIT_DONE:
            job.state, job.message = "done", ""  # it came to its end before the request reached it
        if job.state == "running":
            stopped = job.exit_code == EXIT_STOPPED or (job.exit_code in SIGNALLED and self._stop())
            job.state = "done" if job.exit_code == EXIT_DONE else "stopped" if stopped else "failed"
            job.message = _reason(Path(job.run_dir) / LOG) if job.state == "failed" else ""
        job.seconds = time.monotonic() - start

    def _same(self, job: Job) -> bool:
        """Whether the run folder holds this very job, started before."""
        config, status = Path(job.run_dir) / "config.yaml", Path(job.run_dir) / "status.json"
        return config.is_file() and status.is_file() and config.read_text("utf-8") == dump(self._configs[job.run_dir])

    def _wants_stop(self, job: Job) -> int:
        if job.state == "running" and (reason := self._loses(job)):
            job.state, job.message = "pruned", reason
        return int(self._stop() or job.state == "pruned")

    def _loses(self, job: Job) -> str:
        """The median rule (Golovin et al. 2017): worse than half of the variant's other jobs were at the same step."""
        mine = self._values.get(job.run_dir, {})
        if self._settings.early_stop != "median" or not mine or max(mine) < self._settings.grace_steps:
            return ""
        step = max(mine)
        rivals = [other.run_dir for other in self.jobs if other is not job and other.variant == job.variant]
        others = [values[step] for folder in rivals if step in (values := self._values.get(folder, {}))]
        if len(others) < RIVALS or step >= job.steps:
            return ""
        middle = statistics.median(others)
        return f"{mine[step]:.4g} at step {step}, median {middle:.4g}" if self._sign * (mine[step] - middle) > 0 else ""

    def refresh(self) -> None:
        """Read how far every job is, show it, and keep it in the sweep's folder."""
        for job in self.jobs:
            records = read_journal(Path(job.run_dir) / METRICS_FILE)
            metric = self._settings.metric
            found = {record["step"]: record[metric] for record in records if record.get(metric) is not None}
            self._values[job.run_dir] = found
            job.step = records[-1]["step"] if records else 0
            job.value = found[max(found)] if found else None
        record = {
            "name": self._config.name,
            "metric": self._settings.metric,
            "jobs": [asdict(job) for job in self.jobs],
        }
        write_atomic(self.folder / RESULTS, json.dumps(record, indent=1) + "\n")
        self._show(self.jobs)

    def _outcome(self, jobs: list[Job]) -> float | Exception:
        values = [job.value for job in jobs if job.state in ("done", "pruned") and job.value is not None]
        if len(values) == len(jobs):
            return statistics.mean(values)
        job = next(job for job in jobs if job.state not in ("done", "pruned") or job.value is None)
        return JobFailed(f"{job.label}: {job.state} {job.message}")


def _recorded(results: Path) -> dict[str, dict[str, Any]]:
    """What the sweep's folder says of the jobs of an earlier command, by run folder."""
    return {job["run_dir"]: job for job in read_json(results)["jobs"]} if results.is_file() else {}


def _reason(log: Path) -> str:
    """Why a job failed, from its log: the head of the last error that was told, and its fix; else the last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.is_file() else []
    heads = [number for number, line in enumerate(lines) if ERROR.match(line)]
    if not heads:
        return lines[-1][:MESSAGE_LENGTH] if lines else "it said nothing"
    told = [lines[heads[-1]], *(line.strip() for line in lines[heads[-1] + 1 :][:2])]
    return "; ".join(told)[:MESSAGE_LENGTH]


def goal(metric: str) -> str:
    """Whether a metric is to be minimized or maximized.

    Raises:
        ConfigError: it is no metric, or neither.
    """
    goals = {row.name: row.goal for row in METRICS if row.goal != NEITHER}
    if metric not in goals:
        raise ConfigError("sweep.metric", metric, f"one of {', '.join(goals)}", nearest(metric, list(goals)))
    return goals[metric]


def main(name: str, arguments: list[str]) -> int:
    config, fixed = load_sweep(arguments)
    aim = goal(config.sweep.metric)

    # Ray loads here, after the mistakes that can be answered without it.
    from cluster.jobs import REVISION_VARIABLE, JobServer, job_server
    from launch.signals import stop_requests
    from trainers.lineage import git_revision

    def runner(server: JobServer) -> Run:
        def run(job: list[str], log: Path, stop: Callable[[], int]) -> int:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("w", encoding="utf-8", buffering=1) as file:
                return server.run(["train", *job], on_line=lambda line: print(line, file=file), stop=stop)

        return run

    env = {REVISION_VARIABLE: git_revision()}
    with stop_requests() as stops, job_server(config.cluster, working_dir=Path.cwd(), env=env) as server:
        room = Room(server.total("CPU"), server.total("GPU"), config.sweep.parallel)
        print(f"sweep {config.name}: {aim} {config.sweep.metric}, {_bounds(room)}", flush=True)
        with table(config.sweep.metric, lowest_first=aim == MINIMIZE) as show:
            sweep = Sweep(config, fixed, runner(server), room=room, show=show, stop=lambda: bool(stops))
            multirun(arguments, sweep, sweep.folder, aim)
    return _conclude(sweep, stopped=bool(stops))


def _conclude(sweep: Sweep, stopped: bool) -> int:
    from trainers.comparison import write_comparison  # matplotlib

    if any(job.step for job in sweep.jobs):
        print(f"report: {write_comparison([Path(job.run_dir) for job in sweep.jobs if job.step], sweep.folder)}")
    if stopped:
        print("stopped; the same command goes on from there")
        return EXIT_STOPPED
    failed = [job for job in sweep.jobs if job.state == "failed"]
    for job in failed:
        print(f"failed: {job.label}, log in {Path(job.run_dir) / LOG}")
    return max((job.exit_code or EXIT_BUG for job in failed), default=EXIT_DONE)


def _bounds(room: Room) -> str:
    there = f"{room.cpus:g} CPUs" + (f" and {room.gpus:g} GPUs" if room.gpus else "")
    return f"as many jobs at a time as fit {there}" + (f", at most {room.most}" if room.most else "")

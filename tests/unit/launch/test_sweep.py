"""A sweep: Hydra proposes, jobs run side by side, failures stay apart, what is done is not run again."""

import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from conf.errors import EXIT_DONE, EXIT_RESOURCES, EXIT_STOPPED, EXIT_TERMINATED, ConfigError, ResourceError
from launch.multirun import OPTUNA, load_sweep, multirun
from launch.preflight import dump, load_config
from launch.room import Need, Room
from launch.sweep import LOG, RESULTS, Job, Run, Sweep
from launch.sweep_table import table

STEPS = 20
COMPOSING = threading.Lock()  # Hydra composes in one thread at a time; a real job does it in a process of its own


class Runs:
    """Stands in for Ray: a job's losses follow from its learning rate; it obeys stop requests between steps."""

    def __init__(self, failing: float | None = None, refused: float | None = None) -> None:
        self.started: list[float] = []
        self.failing, self.refused = failing, refused

    def __call__(self, arguments: list[str], log: Path, stop: Callable[[], int]) -> int:
        with COMPOSING:
            config = load_config(arguments)
        run_dir, rate = Path(config.run_dir), config.trainer.lr
        self.started.append(rate)
        run_dir.mkdir(parents=True, exist_ok=True)
        if rate == self.failing:
            log.write_text("loading\nout of memory\n")
            return 3
        if rate == self.refused:
            log.write_text("loading\ndata error: x\n  rule: y\n  fix:  z\nbye\n")
            return 2
        (run_dir / "config.yaml").write_text(dump(config))
        with (run_dir / "metrics.jsonl").open("w") as file:
            for step in range(1, STEPS + 1):
                file.write(json.dumps({"step": step, "train/loss": 1.0, "eval/loss": (rate - 0.02) ** 2}) + "\n")
        (run_dir / "status.json").write_text(json.dumps({"state": "done"}))
        return EXIT_STOPPED if stop() else EXIT_DONE


ROOM = Room(2, 0)


def sweep(
    folder: Path, arguments: list[str], run: Run, stop: Callable[[], bool] = lambda: False, room: Room = ROOM
) -> Sweep:
    common = [f"run_dir='{folder}'", "name=search", f"trainer.steps={STEPS}"]
    config, fixed = load_sweep([*common, *arguments])
    found = Sweep(config, fixed, run, room=room, show=lambda jobs: None, stop=stop)
    multirun([*common, *arguments], found, folder, "minimize")
    return found


def states(jobs: Sequence[Job]) -> dict[str, str]:
    return {job.label: job.state for job in jobs}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launch.sweep.POLL_SEC", 0.01)


def test_all_combinations_run_and_a_failure_stays_apart(tmp_path: Path) -> None:
    run = Runs(failing=0.01)
    found = sweep(tmp_path, ["trainer.lr=0.01,0.02", "model=tiny,small"], run)
    assert sorted(run.started) == [0.01, 0.01, 0.02, 0.02]
    assert states(found.jobs) == {
        "trainer.lr=0.01,model=tiny": "failed",
        "trainer.lr=0.01,model=small": "failed",
        "trainer.lr=0.02,model=tiny": "done",
        "trainer.lr=0.02,model=small": "done",
    }
    failed = found.jobs[0]
    assert (failed.exit_code, failed.message) == (3, "out of memory")
    assert (Path(failed.run_dir) / LOG).exists()
    kept = json.loads((tmp_path / RESULTS).read_text())
    assert kept["metric"] == "eval/loss"
    assert [row["value"] for row in kept["jobs"] if row["state"] == "done"] == [0.0, 0.0]


def test_a_second_run_repeats_only_what_failed_or_changed(tmp_path: Path) -> None:
    sweep(tmp_path, ["trainer.lr=0.01,0.02,0.03"], Runs(failing=0.02))
    again = Runs()
    found = sweep(tmp_path, ["trainer.lr=0.01,0.02,0.03"], again)
    assert again.started == [0.02]
    assert set(states(found.jobs).values()) == {"done"}
    changed = Runs()
    sweep(tmp_path, ["trainer.lr=0.01,0.02", "trainer.batch=16"], changed)
    assert sorted(changed.started) == [0.01, 0.02]


def test_a_stop_request_leaves_the_rest_unrun(tmp_path: Path) -> None:
    run = Runs()
    found = sweep(tmp_path, ["trainer.lr=0.01,0.02,0.03"], run, stop=lambda: len(run.started) > 0)
    assert len(run.started) < 3
    assert set(states(found.jobs).values()) == {"stopped"}


def test_the_median_rule_stops_losers_only(tmp_path: Path) -> None:
    settings = ["sweep.early_stop=median", "sweep.grace_steps=2", f"run_dir='{tmp_path}'"]
    found = Sweep(load_config(settings), [], Runs(), room=ROOM, show=lambda jobs: None)
    losses = {"good": {1: 3.0, 2: 2.0}, "fair": {1: 2.0, 2: 2.4}, "poor": {1: 2.5, 2: 2.9}, "young": {1: 9.0}}
    found._values = losses
    jobs = {name: Job(name, [], name, steps=10) for name in losses}
    found.jobs = list(jobs.values())
    assert {name for name, job in jobs.items() if found._loses(job)} == {"poor"}
    del losses["fair"]
    assert not found._loses(jobs["poor"]), "one rival is no field"


def test_the_median_rule_compares_a_variant_with_itself(tmp_path: Path) -> None:
    settings = ["sweep.early_stop=median", f"run_dir='{tmp_path}'"]
    found = Sweep(load_config(settings), [], Runs(), room=ROOM, show=lambda jobs: None)
    found.jobs = [
        Job(f"{size}{n}", [], f"{size}{n}", 10, variant=size) for size in ("large", "small") for n in (1, 2, 3)
    ]
    found._values = {
        job.run_dir: {1: (3.0 if job.variant == "large" else 5.0) + int(job.label[-1])} for job in found.jobs
    }
    assert {job.label for job in found.jobs if found._loses(job)} == {"large3", "small3"}


def test_a_loser_that_was_done_before_it_could_be_stopped_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Runs()

    def to_the_end(arguments: list[str], log: Path, stop: Callable[[], int]) -> int:
        run(arguments, log, lambda: 0)
        assert stop()
        return EXIT_DONE

    found = Sweep(load_config([f"run_dir='{tmp_path}'"]), [], to_the_end, room=ROOM, show=lambda jobs: None)
    monkeypatch.setattr(found, "_loses", lambda job: "worse")
    found.batch([["trainer.lr=0.01"]])
    assert [(job.state, job.message) for job in found.jobs] == [("done", "")]


def test_losers_stay_stopped_when_a_sweep_goes_on(tmp_path: Path) -> None:
    arguments = ["trainer.lr=0.01,0.02,0.03", "sweep.early_stop=median"]
    sweep(tmp_path, arguments, Runs())
    kept = json.loads((tmp_path / RESULTS).read_text())
    kept["jobs"][0] |= {"state": "pruned", "message": "9 at step 5, median 3", "seconds": 7.0}
    (tmp_path / RESULTS).write_text(json.dumps(kept))
    (tmp_path / "trainer.lr=0.01" / "status.json").write_text(json.dumps({"state": "stopped"}))
    again = Runs()
    found = sweep(tmp_path, arguments, again)
    assert again.started == []
    job = found.jobs[0]
    assert (job.state, job.message, job.value) == ("pruned", "9 at step 5, median 3", pytest.approx(1e-4))
    sweep(tmp_path, [*arguments[:1], "sweep.early_stop=none"], again)
    assert 0.01 in again.started, "nothing is to be stopped any more"


def test_a_piped_table_has_a_line_for_each_job(capsys: pytest.CaptureFixture[str]) -> None:
    label = "trainer.lr=0.0001,sequence=bidirectional_ring,cluster.ranks=2"
    with table("eval/loss", lowest_first=True) as show:
        show([Job(label, [], "a", 10, "failed", message="data error: " + 80 * "x")])
    last = capsys.readouterr().out.splitlines()[-1]
    assert label in last
    assert 80 * "x" in last


def test_optuna_searches_towards_the_minimum_and_resumes(tmp_path: Path) -> None:
    search = [OPTUNA, "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=1"]
    search.append("trainer.lr=interval(0.001,0.1)")
    run, again = Runs(), Runs()
    found = sweep(tmp_path, search, run)
    assert len(set(run.started)) == 4
    assert all(0.001 <= rate <= 0.1 for rate in run.started)
    assert sorted(job.value or 0.0 for job in found.jobs) == pytest.approx(sorted((r - 0.02) ** 2 for r in run.started))
    sweep(tmp_path, search, again)
    assert again.started == [], "the same seed proposes the same jobs, and they are done"


@pytest.mark.parametrize(
    ("arguments", "field", "text"),
    [
        (["trainer.lr=0.1"], "sweep", "at least one key has several values"),
        (["trainer.lr=0.1,fast"], "trainer.lr", "must be a number"),
        (["model=tiny,smal"], "model", "small"),
        (["trainer.learnin_rate=1,2"], "trainer.learnin_rate", "unknown key"),
        (["trainer.steps=1,2", "trainer.batch=0"], "trainer.batch", ""),
    ],
)
def test_mistakes_are_answered_before_anything_starts(arguments: list[str], field: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(arguments)
    assert caught.value.field == field
    assert text in str(caught.value)


def test_a_mistake_in_hydras_own_settings_is_a_config_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n_trails"):
        sweep(tmp_path, [OPTUNA, "hydra.sweeper.n_trails=4", "trainer.lr=0.1,0.2"], Runs())


def test_every_job_runs_once_with_each_variant(tmp_path: Path) -> None:
    variants = "sweep.variants=['model=tiny trainer.batch=4','model=small']"
    run = Runs()
    found = sweep(tmp_path, [variants, "trainer.lr=0.01,0.02"], run)
    labels = {
        f"trainer.lr={lr},{own}" for lr in ("0.01", "0.02") for own in ("model=tiny,trainer.batch=4", "model=small")
    }
    assert states(found.jobs) == dict.fromkeys(labels, "done")
    configs = [load_config(job.arguments) for job in found.jobs]
    assert sorted((c.trainer.lr, c.trainer.batch, c.model.dim) for c in configs)[:2] == [(0.01, 4, 96), (0.01, 8, 256)]
    assert states(sweep(tmp_path / "one", [variants], Runs()).jobs) == {
        "model=tiny,trainer.batch=4": "done",
        "model=small": "done",
    }


def test_a_wrong_variant_is_answered_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="model"):
        load_sweep(["sweep.variants=['model=huge']"])


class Crowd:
    """Jobs of one and two ranks: those of one wait for each other, so they end only if they run side by side."""

    def __init__(self) -> None:
        self.pair, self.lock = threading.Barrier(2), threading.Lock()
        self.ranks, self.most = 0, 0

    def __call__(self, arguments: list[str], log: Path, stop: Callable[[], int]) -> int:
        with COMPOSING:
            ranks = load_config(arguments).cluster.ranks
        with self.lock:
            self.ranks += ranks
            self.most = max(self.most, self.ranks)
        if ranks == 1:
            self.pair.wait(60)
        with self.lock:
            self.ranks -= ranks
        return EXIT_DONE


@pytest.mark.parametrize("order", ["2,1", "1,2"])
def test_each_job_gets_its_own_resources(tmp_path: Path, order: str) -> None:
    run = Crowd()
    found = sweep(tmp_path, [f"cluster.ranks={order}", "trainer.lr=0.01,0.02"], run)
    assert {job.exit_code for job in found.jobs} == {EXIT_DONE}
    assert run.most == 2


def test_a_failure_is_told_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = sweep(tmp_path, ["trainer.lr=0.01,0.02"], Runs(refused=0.01))
    assert [(job.state, job.message) for job in found.jobs] == [
        ("failed", "data error: x; rule: y; fix:  z"),
        ("done", ""),
    ]
    assert capsys.readouterr().err == ""


def test_a_job_that_a_stop_reached_before_its_first_step_is_stopped(tmp_path: Path) -> None:
    asked: list[int] = []

    def run(arguments: list[str], log: Path, stop: Callable[[], int]) -> int:
        asked.append(stop())
        return EXIT_TERMINATED

    found = sweep(tmp_path, ["trainer.lr=0.01,0.02"], run, stop=lambda: len(asked) > 0)
    assert {job.state for job in found.jobs} == {"stopped"}
    killed = sweep(tmp_path, ["trainer.lr=0.01", "sweep.variants=['seed=1']"], lambda *_: EXIT_TERMINATED)
    assert {job.state for job in killed.jobs} == {"failed"}


def test_small_jobs_pass_one_that_does_not_fit() -> None:
    room = Room(2, 0)

    def hold_all() -> None:
        with room.lend(Need(2, 0), lambda: False):
            pass

    large = threading.Thread(target=hold_all)
    with room.lend(Need(1, 0), lambda: False):
        large.start()
        while not room._queue:
            time.sleep(0.01)
        with room.lend(Need(1, 0), lambda: False) as lent:
            assert lent
    large.join(60)
    assert not large.is_alive()


def test_a_job_that_never_fits_fails_apart(tmp_path: Path) -> None:
    run = Runs()
    found = sweep(tmp_path, ["cluster.ranks=1,3", "sequence=local", "trainer.batch=6"], run)
    assert states(found.jobs) == {"cluster.ranks=1": "done", "cluster.ranks=3": "failed"}
    assert found.jobs[1].exit_code == EXIT_RESOURCES
    assert "its ranks need 3 CPUs, the cluster has 2" in found.jobs[1].message
    assert len(run.started) == 1


def test_an_elastic_job_needs_room_for_its_fewest_ranks() -> None:
    cluster = load_config(["cluster.ranks=4", "cluster.min_ranks=2", "trainer.batch=8"]).cluster
    assert [Room(cpus, 0).need(cluster).cpus for cpus in (4, 3)] == [4, 2]
    gpus = load_config(["cluster.ranks=2", "cluster.gpus_per_rank=1", "trainer.batch=8"]).cluster
    with pytest.raises(ResourceError, match="need 2 GPUs, the cluster has 1"):
        Room(8, 1).need(gpus)


def test_no_more_jobs_at_a_time_than_allowed() -> None:
    room, need = Room(8, 0, most=1), Need(1, 0)
    with room.lend(need, lambda: False) as first, room.lend(need, lambda: True) as second:
        assert (first, second) == (True, False)
    with room.lend(need, lambda: False) as again:
        assert again

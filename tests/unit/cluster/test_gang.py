"""Gangs of two tiny ranks: what they are given, what they say, and how they fail."""

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.failures import RankFailed, StopForced
from cluster.gang import Gang
from cluster.processes import state
from conf.errors import DataError, ResourceError
from conf.schema import ClusterConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")
RANKS = "tests.helpers.ranks"


def test_ranks_get_their_environment_and_meet(cluster: ClusterConfig, tmp_path: Path) -> None:
    with Gang(cluster, log_dir=tmp_path) as gang:
        results = gang.run(f"{RANKS}:report", {"a": 1})
        pids = [seat.pid for seat in gang.seats]
    assert [result["RANK"] for result in results] == ["0", "1"]
    assert [result["LOCAL_RANK"] for result in results] == ["0", "1"]
    assert {result["WORLD_SIZE"] for result in results} == {result["LOCAL_WORLD_SIZE"] for result in results} == {"2"}
    assert {result["MASTER_ADDR"] for result in results} == {"127.0.0.1"}
    assert results[0]["MASTER_PORT"] == results[1]["MASTER_PORT"]
    assert {result["OMP_NUM_THREADS"] for result in results} == {"1"}
    assert {result["device"] for result in results} == {"lo"}
    assert results[0]["peers"] == [1]
    assert {result["cwd"] for result in results} == {os.getcwd()}
    assert [result["config"] for result in results] == [{"a": 1}] * 2
    assert not any(result["torch"] for result in results)
    assert [result["pid"] for result in results] == pids
    assert not any(state(pid) for pid in pids)
    for rank in (0, 1):
        log = (tmp_path / f"rank-{rank:03d}.log").read_text()
        assert log.startswith(f"--- rank {rank} pid {pids[rank]} on ")
        assert f"python output of rank {rank}" in log
        assert f"native output of rank {rank}" in log


def test_torch_binds_the_port_that_is_held_for_it(cluster: ClusterConfig) -> None:
    with Gang(cluster) as gang:
        assert gang.run(f"{RANKS}:torch_store", None) == ["here", "here"]


def test_events_of_rank_0_arrive_in_order_and_completely(cluster: ClusterConfig) -> None:
    events: list[dict[str, Any]] = []
    with Gang(cluster) as gang:
        gang.run(f"{RANKS}:emit_numbers", {"count": 500}, events.append)
    assert events == [{"kind": "metrics", "step": step, "rank": 0} for step in range(500)]


def test_an_event_arrives_while_the_rankstate(cluster: ClusterConfig, tmp_path: Path) -> None:
    with Gang(cluster) as gang:
        heard = tmp_path / "heard"
        assert gang.run(f"{RANKS}:emit_until_heard", {"file": str(heard)}, lambda event: heard.touch()) == ["heard"] * 2


@pytest.mark.parametrize(("how", "message"), [("raise", "ZeroDivisionError: no number"), ("exit", "SystemExit: 4")])
def test_the_first_failure_ends_the_gang(cluster: ClusterConfig, tmp_path: Path, how: str, message: str) -> None:
    with pytest.raises(RankFailed) as caught, Gang(cluster, log_dir=tmp_path) as gang:
        gang.run(f"{RANKS}:fail_in_rank_1", {"how": how})
    failure = caught.value
    assert (failure.rank, failure.message, failure.died) == (1, message, False)
    assert failure.log_path == str(tmp_path / "rank-001.log")
    assert "last words" in failure.tail
    assert message in failure.tail
    assert not any(state(seat.pid) for seat in gang.seats)
    deadline = time.monotonic() + 30  # Ray's own view of what is free lags
    while ray.available_resources().get("CPU", 0) < ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, "the reservation was not given back"
        time.sleep(0.1)


def test_a_killed_rank_is_noticed_and_named(cluster: ClusterConfig, tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as caught, Gang(cluster, log_dir=tmp_path) as gang:
        gang.run(f"{RANKS}:fail_in_rank_1", {"how": "kill"})
    assert (caught.value.rank, caught.value.died) == (1, True)
    assert "its process died" in str(caught.value)
    assert "last words" in caught.value.tail
    assert not any(state(seat.pid) for seat in gang.seats)


@pytest.mark.parametrize("error", ["lost", "broken"])
def test_the_dead_rank_is_blamed_not_the_one_that_saw_it_die(cluster: ClusterConfig, error: str) -> None:
    with pytest.raises(RankFailed) as caught, Gang(cluster) as gang:
        gang.run(f"{RANKS}:die_while_peer_sees_it", {"error": error})
    assert (caught.value.rank, caught.value.died) == (1, True)


def test_a_user_error_comes_back_as_itself(cluster: ClusterConfig) -> None:
    with pytest.raises(DataError, match="pack again") as caught, Gang(cluster) as gang:
        gang.run(f"{RANKS}:fail_in_rank_1", {"how": "user"})
    assert caught.value.field == "shard.bin"


def test_cancel_reaches_all_ranks(cluster: ClusterConfig) -> None:
    with Gang(cluster) as gang:
        results = gang.run(f"{RANKS}:wait_for_stop", None, lambda event: gang.cancel())
    assert results == [{"status": "stopped", "step": 7, "rank": rank} for rank in (0, 1)]


def test_a_second_stop_kills(cluster: ClusterConfig) -> None:
    stops: list[int] = []
    with pytest.raises(StopForced, match="asked twice"), Gang(cluster, stop=lambda: len(stops)) as gang:
        gang.run(f"{RANKS}:block", None, lambda event: stops.extend([1, 2]))
    assert not any(state(seat.pid) for seat in gang.seats)


def test_ranks_deaf_to_a_stop_are_killed_and_say_where_they_were(cluster: ClusterConfig, tmp_path: Path) -> None:
    with (
        pytest.raises(StopForced, match="did not end within"),
        Gang(cluster, log_dir=tmp_path, stop_timeout_sec=0.1) as gang,
    ):
        gang.run(f"{RANKS}:block", None, lambda event: gang.cancel())
    assert not any(state(seat.pid) for seat in gang.seats)
    assert "in block" in (tmp_path / "rank-000.log").read_text()


def test_a_frozen_rank_is_killed_too(cluster: ClusterConfig) -> None:
    def freeze(event: dict[str, Any]) -> None:
        os.kill(gang.seats[1].pid, signal.SIGSTOP)
        os.kill(gang.seats[0].pid, signal.SIGKILL)

    with pytest.raises(RankFailed) as caught, Gang(cluster) as gang:
        gang.run(f"{RANKS}:block", None, freeze)
    assert caught.value.rank == 0
    assert not any(state(seat.pid) for seat in gang.seats)


def hasty(cluster: ClusterConfig, seconds: float) -> ClusterConfig:
    return replace(cluster, hang_timeout_sec=seconds)


def test_ranks_without_progress_are_killed_and_say_where_they_were(cluster: ClusterConfig, tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match="no progress for") as caught, Gang(hasty(cluster, 1.5), log_dir=tmp_path) as g:
        g.run(f"{RANKS}:block", None)
    assert caught.value.died
    assert "ranks [0, 1]" in caught.value.message
    for rank in (0, 1):
        assert "in block" in (tmp_path / f"rank-{rank:03d}.log").read_text()
    assert not any(state(seat.pid) for seat in g.seats)


def test_progress_is_what_keeps_the_watchdog_quiet(cluster: ClusterConfig) -> None:
    with Gang(hasty(cluster, 1.5)) as gang:
        results = gang.run(f"{RANKS}:work_slowly", {"steps": 12, "sec": 0.3})
    assert [result["step"] for result in results] == [12, 12]


def test_the_frozen_rank_is_named_and_says_where_it_was(cluster: ClusterConfig, tmp_path: Path) -> None:
    def freeze(event: dict[str, Any]) -> None:
        pid, deadline = gang.seats[1].pid, time.monotonic() + 60
        while not (tmp_path / str(pid)).exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(pid, signal.SIGSTOP)

    with (
        pytest.raises(RankFailed, match="stopped by a signal") as caught,
        Gang(hasty(cluster, 2), log_dir=tmp_path) as gang,
    ):
        gang.run(f"{RANKS}:block", {"folder": str(tmp_path)}, freeze)
    assert (caught.value.rank, caught.value.died) == (1, True)
    for rank in (0, 1):
        assert "in block" in (tmp_path / f"rank-{rank:03d}.log").read_text()
    assert not any(state(seat.pid) for seat in gang.seats)


def test_the_frozen_rank_is_blamed_not_the_one_that_gives_up_waiting(cluster: ClusterConfig) -> None:
    def freeze(event: dict[str, Any]) -> None:
        os.kill(gang.seats[1].pid, signal.SIGSTOP)
        Path(event["go"]).touch()

    with pytest.raises(RankFailed) as caught, Gang(cluster) as gang:
        gang.run(f"{RANKS}:give_up_in_rank_0", None, freeze)
    assert (caught.value.rank, caught.value.died) == (1, True)


def test_more_ranks_than_cpus_is_an_error_with_a_table() -> None:
    with pytest.raises(ResourceError) as caught, Gang(ClusterConfig(ranks=500)):
        raise AssertionError("the gang started")
    assert caught.value.field == "cluster.ranks"
    assert f"fits {int(ray.cluster_resources()['CPU'])}" in caught.value.rule


def test_ranks_that_fit_but_find_the_cluster_full_time_out(cluster: ClusterConfig) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    waiting = ClusterConfig(ranks=cpus, start_timeout_sec=1.0)
    with Gang(cluster), pytest.raises(ResourceError, match="were not free within 1 s"), Gang(waiting):
        raise AssertionError("the second gang started")


def test_a_gang_runs_in_a_thread_too(cluster: ClusterConfig) -> None:
    results: list[Any] = []

    def work() -> None:
        with Gang(cluster) as gang:
            results.extend(gang.run(f"{RANKS}:emit_numbers", {"count": 1}))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(120)
    assert [result["step"] for result in results] == [1, 1]

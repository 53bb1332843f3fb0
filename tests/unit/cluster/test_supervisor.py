"""Supervision: another gang after a failure, none after a user error, and a record of both."""

from pathlib import Path
from typing import Any

import pytest

from cluster.failures import RankFailed, StopForced
from cluster.supervisor import ATTEMPTS, read_attempts, supervise
from conf.errors import DataError
from conf.schema import ClusterConfig, RunConfig, TrainerConfig

pytestmark = pytest.mark.usefixtures("ray_cluster")
RANKS = "tests.helpers.ranks"


@pytest.fixture
def config(tmp_path: Path, cluster: ClusterConfig) -> RunConfig:
    return RunConfig(run_dir=str(tmp_path / "run"), cluster=cluster, trainer=TrainerConfig(steps=4))


def records(config: RunConfig) -> list[tuple[int, str]]:
    return [(record["attempt"], record["event"]) for record in read_attempts(Path(config.run_dir))]


def test_a_killed_rank_is_followed_by_another_gang_that_goes_on(config: RunConfig) -> None:
    events: list[dict[str, Any]] = []
    Path(config.run_dir).mkdir()
    result = supervise(config, f"{RANKS}:resume", on_event=events.append)
    assert (result["status"], result["step"]) == ("done", 4)
    assert result["started_at"] > 0
    assert records(config) == [(1, "started"), (1, "failed"), (2, "started"), (2, "done")]
    first, failed, second, last = read_attempts(Path(config.run_dir))
    assert (failed["rank"], failed["died"]) == (1, True)
    assert {rank["pid"] for rank in first["ranks"]}.isdisjoint({rank["pid"] for rank in second["ranks"]})
    assert last["step"] == 4
    messages = [event["message"] for event in events if event["kind"] == "log"]
    assert "rank 1" in messages[0]
    assert messages[1].startswith("restart 1 of 3")
    assert (Path(config.run_dir) / "logs" / "rank-001.log").read_text().count("--- rank 1 pid") == 2


def test_attempts_are_numbered_over_commands(config: RunConfig) -> None:
    Path(config.run_dir).mkdir()
    (Path(config.run_dir) / ATTEMPTS).write_text('{"attempt": 6, "event": "started"}\n{"attempt": 7, "ev')
    with pytest.raises(DataError):
        supervise(config, f"{RANKS}:user_error")
    assert records(config) == [(6, "started"), (6, "abandoned"), (7, "started"), (7, "error")]


def test_a_user_error_is_not_tried_again(config: RunConfig) -> None:
    with pytest.raises(DataError, match="another corpus"):
        supervise(config, f"{RANKS}:user_error")
    assert records(config) == [(1, "started"), (1, "error")]


def test_the_same_failure_without_progress_is_tried_once_again(config: RunConfig) -> None:
    with pytest.raises(RankFailed, match="the same every time"):
        supervise(config, f"{RANKS}:always_raise")
    assert records(config) == [(1, "started"), (1, "failed"), (2, "started"), (2, "failed")]


def test_restarts_are_bounded(config: RunConfig) -> None:
    config.cluster = ClusterConfig(**{**vars(config.cluster), "max_restarts": 0})
    with pytest.raises(RankFailed):
        supervise(config, f"{RANKS}:always_raise")
    assert records(config) == [(1, "started"), (1, "failed")]


def test_a_stop_reaches_the_ranks_and_their_result_comes_back(config: RunConfig) -> None:
    events: list[dict[str, Any]] = []
    result = supervise(config, f"{RANKS}:wait_for_stop", on_event=events.append, stop=lambda: len(events))
    assert (result["status"], result["step"]) == ("stopped", 7)
    assert records(config) == [(1, "started"), (1, "stopped")]


def test_a_stop_before_the_ranks_begin_gives_a_stopped_result(config: RunConfig) -> None:
    def stop() -> int:
        return 1

    result = supervise(config, f"{RANKS}:wait_for_stop", stop=stop)
    assert result["status"] == "stopped"


def test_a_second_stop_kills(config: RunConfig) -> None:
    events: list[dict[str, Any]] = []
    with pytest.raises(StopForced):
        supervise(
            config, f"{RANKS}:block", on_event=lambda event: events.extend([event, event]), stop=lambda: len(events)
        )
    assert records(config) == [(1, "started"), (1, "error")]

"""Units run in other processes and come back in order; failures keep their meaning."""

import os
from pathlib import Path

import pytest
import ray

from cluster.connection import Connection
from cluster.failures import UnitFailed
from cluster.pipeline import run_units
from conf.errors import DataError
from conf.schema import ClusterConfig


@pytest.mark.usefixtures("ray_cluster")
class TestRunUnits:
    def test_results_come_in_unit_order_and_progress_counts_every_unit(self, cluster: ClusterConfig) -> None:
        units = [{"number": number, "pause": 0.05 * (number == 0)} for number in range(9)]
        seen: list[tuple[int, int]] = []
        results = run_units(
            cluster, "square", "tests.helpers.units:square", units, lambda done, total: seen.append((done, total))
        )
        assert [result["number"] for result in results] == [number**2 for number in range(9)]
        assert seen == [(done, 9) for done in range(10)]
        assert os.getpid() not in {result["pid"] for result in results}
        assert {result["cwd"] for result in results} == {os.getcwd()}

    def test_units_run_beside_each_other(self, cluster: ClusterConfig, tmp_path: Path) -> None:
        if ray.cluster_resources()["CPU"] < 2:
            pytest.skip("needs two CPUs")
        units = [{"number": number, "folder": str(tmp_path)} for number in range(2)]
        results = run_units(cluster, "meet", "tests.helpers.units:meet", units)
        assert len({result["pid"] for result in results}) == 2

    def test_no_units_need_no_cluster(self, cluster: ClusterConfig) -> None:
        assert run_units(cluster, "none", "tests.helpers.units:square", []) == []

    def test_a_unit_that_kills_its_process_is_run_again(self, cluster: ClusterConfig, tmp_path: Path) -> None:
        marker = tmp_path / "died"
        units = [{"number": number, "dies": number == 1, "marker": str(marker)} for number in range(4)]
        results = run_units(cluster, "die once", "tests.helpers.units:die_once", units)
        assert marker.exists()
        assert [result["number"] for result in results] == [0, 1, 2, 3]

    def test_a_unit_that_always_kills_its_process_is_given_up(self, cluster: ClusterConfig) -> None:
        with pytest.raises(UnitFailed, match=r"unit deadly: a worker process died"):
            run_units(cluster, "die", "tests.helpers.units:die_always", [{"name": "deadly"}])

    def test_a_user_error_comes_back_as_itself(self, cluster: ClusterConfig) -> None:
        with pytest.raises(DataError) as caught:
            run_units(cluster, "refuse", "tests.helpers.units:refuse", [{"name": "a.bin"}])
        assert (caught.value.field, caught.value.value, caught.value.fix) == ("a.bin", "12", "another file")

    def test_another_exception_names_the_unit_and_keeps_the_traceback(
        self, cluster: ClusterConfig, tmp_path: Path
    ) -> None:
        units = [{"name": f"unit {number}", "number": number} for number in (1, 0)]
        with pytest.raises(UnitFailed) as caught:
            run_units(cluster, "divide", "tests.helpers.units:divide", units, log_dir=tmp_path)
        assert caught.value.unit == "unit 0"
        assert "ZeroDivisionError: division by zero" in str(caught.value)
        assert 'return {"number": 1 / unit["number"]}' in (tmp_path / "divide.log").read_text()

    def test_the_next_stage_runs_after_a_failure(self, cluster: ClusterConfig, ray_cluster: Connection) -> None:
        assert run_units(cluster, "square", "tests.helpers.units:square", [{"number": 3}])[0]["number"] == 9

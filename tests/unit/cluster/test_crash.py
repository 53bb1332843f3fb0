"""Workers and drivers of the data stages killed at random on a cluster that goes on; `benchmarks.crash` kills 200."""

from pathlib import Path

import pytest

from benchmarks.crash import crash, settings
from cluster.connection import Connection
from data.curate import curate
from data.stages import serial_units
from tests.helpers.stage_files import stage_files


@pytest.mark.timeout(900)
def test_nothing_is_lost_when_workers_and_drivers_are_killed(ray_cluster: Connection, tmp_path: Path) -> None:
    tally = crash(ray_cluster.address, tmp_path, kills=3, documents=80, stages=(curate,))
    assert (tally.kills, tally.late, tally.different) == (3, [], [])
    assert tally.redone <= tally.allowed
    curate(settings(tmp_path / "alone", tmp_path / "corpus"), serial_units)  # in this process, without Ray
    assert stage_files(tmp_path / "alone") == stage_files(tmp_path / "undisturbed")
    assert crash(ray_cluster.address, tmp_path, kills=3, documents=80, stages=(curate,)) == tally  # read, not run again

"""Workers and drivers of the data stages killed at random on a cluster that goes on; `benchmarks.crash` kills 200."""

from pathlib import Path

import pytest

from benchmarks.crash import crash
from cluster.connection import Connection
from data.curate import curate


@pytest.mark.timeout(900)
def test_nothing_is_lost_when_workers_and_drivers_are_killed(ray_cluster: Connection, tmp_path: Path) -> None:
    tally = crash(ray_cluster.address, tmp_path, kills=3, documents=80, stages=(curate,))
    assert (tally.kills, tally.late, tally.different) == (3, [], [])
    assert tally.redone <= tally.allowed
    assert crash(ray_cluster.address, tmp_path, kills=3, documents=80, stages=(curate,)) == tally  # read, not run again

"""One Ray cluster for all tests of this folder that can share it: starting one takes seconds."""

from collections.abc import Iterator

import pytest

from cluster.connection import Connection, connect
from conf.schema import ClusterConfig


@pytest.fixture(scope="session")
def cluster() -> ClusterConfig:
    """Two ranks that fit on one CPU."""
    return ClusterConfig(ranks=2, cpus_per_rank=0.5, start_timeout_sec=120.0, object_store_mb=128)


@pytest.fixture(scope="session")
def ray_cluster(cluster: ClusterConfig) -> Iterator[Connection]:
    with connect(cluster) as connection:
        yield connection

"""A command that connects, starts a gang of two blocked ranks, says who its processes are, and waits to be killed."""

import json
import os
import sys
from typing import Any

from cluster.connection import connect
from cluster.gang import Gang
from conf.schema import ClusterConfig


def main() -> None:
    cluster = ClusterConfig(ranks=2, cpus_per_rank=0.5, object_store_mb=128)

    def started(event: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps({"driver": os.getpid(), "ranks": [seat.pid for seat in gang.seats]}) + "\n")
        sys.stdout.flush()
        if "raise" in sys.argv:
            raise RuntimeError("the driver fails")

    with connect(cluster), Gang(cluster) as gang:
        gang.run("tests.helpers.ranks:block", None, started)


if __name__ == "__main__":
    main()

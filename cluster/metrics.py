"""A run's numbers as Ray's own metrics: on the Prometheus endpoint of the driver's node, for Grafana.

Every number of a metrics event becomes a gauge: ``train/loss`` is ``ray_sundog_train_loss{run="..."}`` there; what
belongs to a family keeps its last part as a label, ``system/memory_gb/3`` is
``ray_sundog_system_memory_gb{run="...", part="3"}``. ``cluster/dashboards/training.json`` draws them.
"""

import re
from typing import Any

from ray.util.metrics import Gauge

PREFIX = "sundog_"
OWN = {
    "gang_ranks": "ranks of the gang that runs",
    "gang_ranks_wanted": "cluster.ranks",
    "gang_attempts": "gangs started in the run folder so far",
    "gang_restarts": "restarts since the newest checkpoint",
    "run_step": "optimizer steps done",
    "run_checkpoint_step": "step of the newest complete checkpoint",
}


def gauge_name(metric: str) -> tuple[str, str]:
    """Return the gauge of a metric, without Ray's prefix, and its label ``part`` (empty: it has none)."""
    group, _, rest = metric.partition("/")
    name, _, part = rest.partition("/")
    return PREFIX + re.sub(r"\W", "_", f"{group}_{name}"), part


class RunMetrics:
    """The gauges of one run. Needs a connection to Ray."""

    def __init__(self, run: str) -> None:
        self._run, self._gauges = run, dict[str, Gauge]()

    def set(self, name: str, value: float, part: str = "") -> None:
        """Set one gauge, named without Ray's prefix."""
        if name not in self._gauges:
            description = OWN.get(name.removeprefix(PREFIX), "see trainers.metrics")
            self._gauges[name] = Gauge(name, description=description, tag_keys=("run", "part"))
        self._gauges[name].set(value, tags={"run": self._run, "part": part})

    def own(self, **values: float) -> None:
        """Set gauges of the supervisor: names of ``OWN``."""
        for name, value in values.items():
            assert name in OWN, f"{name} has no row in OWN"
            self.set(PREFIX + name, value)

    def event(self, event: dict[str, Any]) -> None:
        """Take an event of rank 0."""
        if event.get("kind") == "metrics":
            self.own(run_step=event["step"])
            for metric, value in event.items():
                if "/" in metric and isinstance(value, int | float):
                    name, part = gauge_name(metric)
                    self.set(name, value, part)
        elif event.get("kind") == "checkpoint":
            self.own(run_checkpoint_step=event["step"])

"""The metrics that Ray serves for Prometheus, and the Grafana dashboard that asks for them."""

import json
import re
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster.metrics import OWN, PREFIX, RunMetrics, gauge_name
from trainers.metrics import METRICS

DASHBOARD = Path(__file__).resolve().parents[3] / "cluster" / "dashboards" / "training.json"
KNOWN = {"ray_" + gauge_name(metric.name)[0] for metric in METRICS} | {f"ray_{PREFIX}{name}" for name in OWN}


def test_names_keep_the_last_part_of_a_family_as_a_label() -> None:
    assert gauge_name("train/loss") == ("sundog_train_loss", "")
    assert gauge_name("eval/loss_by_position/64-127") == ("sundog_eval_loss_by_position", "64-127")
    assert gauge_name("system/memory_gb/") == ("sundog_system_memory_gb", "")


def test_every_metric_that_the_dashboard_asks_for_exists() -> None:
    dashboard: dict[str, Any] = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["query"] for variable in dashboard["templating"]["list"]]
    names = {name for text in asked for name in re.findall(r"\bray_\w+", text)}
    assert len(names) >= 12
    assert names <= KNOWN
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]}
    assert len(places) == len(dashboard["panels"]) == len({panel["id"] for panel in dashboard["panels"]})


@pytest.mark.usefixtures("ray_cluster")
def test_ray_serves_them() -> None:
    metrics = RunMetrics("scraped")
    metrics.event({"kind": "metrics", "step": 7, "steps": 9, "train/loss": 2.5, "system/memory_gb/1": 0.25})
    metrics.event({"kind": "checkpoint", "step": 5, "path": "x"})
    node = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = {"train_loss": "2.5", "system_memory_gb": "0.25", "run_step": "7.0", "run_checkpoint_step": "5.0"}
    deadline = time.monotonic() + 60
    found: dict[str, str] = {}
    while found != wanted:
        assert time.monotonic() < deadline, f"only {found} at {url}"
        time.sleep(0.5)
        text = urllib.request.urlopen(url, timeout=10).read().decode()
        lines = re.findall(r'^ray_sundog_(\w+)\{[^}]*run="scraped"[^}]*\} (\S+)$', text, re.M)
        found = dict(lines)

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from trainers import metrics

ROOT = Path(__file__).parents[3]


def test_names_are_unique_and_have_an_area_and_a_description() -> None:
    names = [metric.name for metric in metrics.METRICS]
    assert len(set(names)) == len(names)
    for metric in metrics.METRICS:
        assert "/" in metric.name
        assert metric.name == metric.name.lower()
        assert metric.description
        assert metric.reduction in (metrics.MAX, metrics.SAME)
        assert metric.goal in (metrics.MINIMIZE, metrics.MAXIMIZE, metrics.NEITHER)


def test_a_family_covers_its_members_and_nothing_else() -> None:
    assert metrics.find("eval/loss_by_position/0-63").name == "eval/loss_by_position/"
    assert metrics.find("eval/loss").name == "eval/loss"
    with pytest.raises(KeyError, match="train/lost"):
        metrics.checked({"train/loss": 1.0, "train/lost": 2.0})


def test_reduction_is_looked_up() -> None:
    names = ["train/loss", "memory/peak_gb", "time/step_sec"]
    assert metrics.reduced_by(metrics.MAX, names) == ["memory/peak_gb", "time/step_sec"]


@pytest.mark.parametrize("context", [2, 63, 64, 65, 512, 1000, 131072])
def test_buckets_tile_the_context(context: int) -> None:
    buckets = metrics.position_buckets(context)
    assert buckets[0][0] == 0
    assert buckets[-1][1] == context
    assert all(a[1] == b[0] for a, b in pairwise(buckets))
    assert all(start < end for start, end in buckets)


def test_bucket_names_say_the_positions() -> None:
    assert [metrics.bucket_name(*bucket) for bucket in metrics.position_buckets(200)] == [
        "eval/loss_by_position/0-63",
        "eval/loss_by_position/64-127",
        "eval/loss_by_position/128-199",
    ]


@pytest.mark.parametrize("module", ["metrics", "console", "report", "journal", "control", "checkpoint_folder"])
def test_light_modules_import_no_torch(module: str) -> None:
    code = f"import sys, trainers.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, cwd=ROOT).returncode == 0

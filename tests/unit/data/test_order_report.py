"""The report of an order: related windows beside random ones, by judges that did not make the order."""

from pathlib import Path

from data.curate import curate
from data.order import order
from data.order_report import COLUMNS, judge, write_report
from data.stages import serial_units
from tests.unit.data.samples import make_config, write_jsonl


def test_a_related_order_is_judged_better_than_a_random_one(tmp_path: Path) -> None:
    config = make_config(tmp_path, write_jsonl(tmp_path / "c.jsonl", 60), context=1024)
    config.curation.deduplicate = False
    curate(config, serial_units)
    ordered = order(config, serial_units)
    rows = {
        (kind, packing): dict(zip(COLUMNS[2:], map(float, values), strict=True))
        for kind, packing, *values in judge(config, ordered)
    }
    ours, other = rows["matching", "concat"], rows["random", "concat"]
    for name in ("pair", "pair, by letters", "share", "compressed"):
        assert ours[name] > other[name], name
    assert rows["matching", "whole"]["cut"] == 0
    page = write_report(config, ordered).read_text()
    assert all(word in page for word in ("by letters", "adjacent similarity", "random"))

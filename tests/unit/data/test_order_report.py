"""The report of an order: related windows beside random ones, by judges that did not make the order."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.curate import curate
from data.documents import BATCH_ROWS
from data.order import order
from data.order_report import COLUMNS, Judge, judge, write_report
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


def test_texts_of_a_part_of_which_a_batch_is_not_asked_for(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [str(row) for row in range(3 * BATCH_ROWS)]}), tmp_path / "part.parquet")
    for rows in ([0, 2 * BATCH_ROWS + 1], [BATCH_ROWS], []):
        assert Judge._texts(tmp_path / "part.parquet", np.array(rows, dtype=np.int64)) == [str(row) for row in rows]

"""The share of the corpus with the highest scores: an exact weighted quantile in two passes of bounded memory.

Scores are float32. Their bits, put in order, are numbers of 32 bits: the first pass sums the weights by the upper 16,
the second by the lower 16 of those that share the bucket in which the share is reached. No score is sorted or
sampled, sums are integers, and the answer does not depend on how the corpus is cut.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data.decide import Deciding, survivors, write_drops
from data.files import canonical_json, read_json, write_atomic
from data.stages import Unit, record_files, unit
from data.steps.preselect import CHARS, SCORE, SOURCE

HALF = 16
BUCKETS = 1 << HALF
REASON = "preselect"
Scores = npt.NDArray[np.float32]
Rows = tuple[Scores, npt.NDArray[np.int64], npt.NDArray[Any]]  # scores, weights, groups


def ordered_bits(scores: Scores) -> npt.NDArray[np.uint32]:
    """Numbers that order as the scores do; -0.0 is 0.0 and NaN is below all."""
    clean = np.where(np.isnan(scores), np.float32(-np.inf), scores.astype(np.float32) + np.float32(0.0))
    bits = clean.view(np.uint32)
    return np.where(bits >> np.uint32(31), ~bits, bits | np.uint32(1 << 31))


def thresholds(passes: Callable[[], Iterator[Rows]], keep: float) -> dict[str, int]:
    """For each group the largest ordered number ``t`` so that what is at least ``t`` weighs ``keep`` of it or more.

    ``passes()`` yields the corpus once, in pieces; it is called twice.
    """
    upper = _histogram(passes(), lambda bits, group: bits >> np.uint32(HALF))
    goals = {group: int(np.ceil(keep * int(sums.sum()))) for group, sums in upper.items()}
    reached = {group: _reach(sums, goals[group]) for group, sums in upper.items()}

    def inside(bits: npt.NDArray[np.uint32], group: str) -> npt.NDArray[np.int64]:
        low = (bits & np.uint32(BUCKETS - 1)).astype(np.int64)
        return np.where(bits >> np.uint32(HALF) == reached[group][0], low, BUCKETS)

    lower = _histogram(passes(), inside)
    found = {}
    for group, (bucket, above) in reached.items():
        low, _ = _reach(lower[group], goals[group] - above)
        found[group] = (bucket << HALF) | low
    return found


def _histogram(rows: Iterator[Rows], bucket: Callable[..., npt.NDArray[Any]]) -> dict[str, npt.NDArray[np.int64]]:
    """Sums of weights by group and bucket; a bucket of BUCKETS is not counted."""
    sums: dict[str, npt.NDArray[np.int64]] = {}
    for scores, weights, groups in rows:
        names, where = np.unique(groups.astype(str), return_inverse=True)
        for index, name in enumerate(names.tolist()):
            mine = where == index
            into = bucket(ordered_bits(scores[mine]), name)
            counted = into < BUCKETS
            total = sums.setdefault(name, np.zeros(BUCKETS, np.int64))
            np.add.at(total, into[counted], weights[mine][counted])
    return sums


def _reach(sums: npt.NDArray[np.int64], goal: int) -> tuple[int, int]:
    """The highest bucket from which on, upwards, the sums reach the goal, and the sum above it."""
    from_top = np.cumsum(sums[::-1])
    place = min(int(np.searchsorted(from_top, max(goal, 1))), BUCKETS - 1)
    return BUCKETS - 1 - place, int(from_top[place - 1]) if place else 0


def select(deciding: Deciding) -> None:
    """Drops what is below the threshold among the documents that still stay."""
    found = deciding.units("preselect threshold", "data.preselect.select:threshold_unit", [{"reason": REASON}])[0]
    shared = {"reason": REASON, "thresholds": found["thresholds"]}
    work = [{**shared, "share": [index, deciding.buckets]} for index in range(deciding.buckets)]
    results = deciding.units("preselect", "data.preselect.select:drop_unit", work)
    deciding.drops += [{"reason": REASON, "file": result["drops"]} for result in results]


def _rows(work: Unit, share: tuple[int, int] = (0, 1)) -> Iterator[tuple[npt.NDArray[np.int64], Rows]]:
    wanted = work["curation"]["preselect"]
    for numbers, table in survivors(work, "preselect", [SCORE, CHARS, SOURCE], share):
        scores = table[SCORE].to_numpy().astype(np.float32)
        weights = table[CHARS].to_numpy() if wanted["weight"] == "chars" else np.ones(len(scores), np.int64)
        names = table[SOURCE].to_pylist() if wanted["per_source"] else [""] * len(scores)
        yield numbers, (scores, weights.astype(np.int64), np.array(names, dtype=object))


@unit
def threshold_unit(work: Unit) -> Unit:
    """The threshold of every group, as a file: ``{group: ordered number}``."""
    found = thresholds(lambda: (rows for _, rows in _rows(work)), work["curation"]["preselect"]["keep"])
    name = f"preselect/thresholds-{work['key']}.json"
    write_atomic(Path(work["folder"]) / name, canonical_json(found))
    return {"thresholds": name, "files": record_files(work["folder"], [name])}


@unit
def drop_unit(work: Unit) -> Unit:
    """The documents of a share of the parts that are below the threshold of their group."""
    limits: dict[str, int] = read_json(Path(work["folder"]) / work["thresholds"])
    dropped = [np.zeros(0, np.int64)]
    for numbers, (scores, _, groups) in _rows(work, tuple(work["share"])):
        limit = np.array([limits[group] for group in groups.astype(str).tolist()], dtype=np.int64)
        dropped.append(numbers[ordered_bits(scores).astype(np.int64) < limit])
    return write_drops(work, np.concatenate(dropped))

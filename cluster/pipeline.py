"""Units of a data stage on Ray Data: one unit a block, results in unit order, errors as they were raised."""

import logging
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError
from ray.util.annotations import RayDeprecationWarning

from cluster.failures import UnitFailed
from cluster.names import resolve
from conf.errors import ResourceError, SundogError
from conf.schema import ClusterConfig

Unit = dict[str, Any]
OnProgress = Callable[[int, int], None]

MAX_RETRIES = 3  # of a unit whose process died; Ray Data's own default is no bound
MAX_BLOCKS = 4096
BLOCK_BYTES = 2**20  # what Ray Data reserves for a block; units are descriptions, not rows
TAIL_LINES = 12


def run_units(
    cluster: ClusterConfig,
    label: str,
    function: str,
    units: list[Unit],
    on_progress: OnProgress | None = None,
    *,
    log_dir: Path | None = None,
) -> list[Unit]:
    """Run ``function`` (a dotted name, called with one unit) on every unit, on the connected cluster.

    Units are small descriptions of work (an input shard, a partition), results are small too; the data itself goes
    through files. ``on_progress(done, total)`` is called in this process. A unit whose process dies is run again, up
    to 3 times.

    Raises:
        SundogError: what a unit raised, as it was raised.
        UnitFailed: a unit raised anything else, or its process kept dying. The traceback is in ``log_dir``, if given.
        ResourceError: the cluster has no CPU.
    """
    if not units:
        return []
    cpus = int(ray.cluster_resources().get("CPU", 0))
    if cpus < 1:
        raise ResourceError("cluster", "0 CPUs", "a data stage needs at least one CPU on the cluster", "add a node")
    _quiet()
    rows = [{"index": index, "unit": pickle.dumps(unit)} for index, unit in enumerate(units)]
    with warnings.catch_warnings():
        # Ray 2.60 announces the end of options without a name of their own, and has no name for this one.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        work = ray.data.from_items(rows, override_num_blocks=min(len(rows), MAX_BLOCKS)).map(
            partial(_run_unit, function=function, folder=os.getcwd()),
            num_cpus=1,
            concurrency=min(cluster.workers or cpus, len(rows)),
            max_retries=MAX_RETRIES,
        )
    results: dict[int, Unit] = {}
    report = on_progress or (lambda done, total: None)
    report(0, len(units))
    try:
        for row in work.iter_rows():
            index = int(row["index"])
            results[index] = _result(label, units[index], pickle.loads(row["outcome"]), log_dir)
            report(len(results), len(units))
    except RayError as error:
        waiting = [unit_name(unit) for index, unit in enumerate(units) if index not in results]
        names = ", ".join(waiting[:3]) + (f" and {len(waiting) - 3} more" if len(waiting) > 3 else "")
        message = f"a worker process died {MAX_RETRIES + 1} times (out of memory?); unfinished: {names}"
        raise UnitFailed(label, waiting[0], message, _tail(str(error))) from error
    return [results[index] for index in range(len(units))]


def _quiet() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = BLOCK_BYTES
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _run_unit(row: dict[str, Any], function: str, folder: str) -> dict[str, Any]:
    """Run one unit in a worker. Never raises: what a unit raises travels back as data, with its traceback as text."""
    with suppress(OSError):
        os.chdir(folder)  # relative paths mean the same as in the command, where the folder exists
    try:
        outcome: tuple[str, Any] = ("done", resolve(function)(pickle.loads(row["unit"])))
        packed = pickle.dumps(outcome)
    except SundogError as error:
        packed = pickle.dumps(("error", error))
    except Exception:
        packed = pickle.dumps(("failed", traceback.format_exc()))
    return {"index": row["index"], "outcome": packed}


def _result(label: str, unit: Unit, outcome: tuple[str, Any], log_dir: Path | None) -> Unit:
    state, value = outcome
    if state == "done":
        return value
    if state == "error":
        raise value
    log_path = ""
    if log_dir is not None:
        log_dir.mkdir(parents=True, exist_ok=True)
        log = log_dir / f"{label.replace('/', '-').replace(' ', '-')}.log"
        with log.open("a") as file:
            file.write(f"unit {unit!r}\n{value}\n")
        log_path = str(log)
    raise UnitFailed(label, unit_name(unit), value.strip().splitlines()[-1], _tail(value), log_path)


def unit_name(unit: Unit) -> str:
    """Return a short name of a unit for messages: its own ``name``, else its start."""
    text = str(unit.get("name") or unit)
    return text if len(text) <= 120 else text[:117] + "..."


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-TAIL_LINES:])

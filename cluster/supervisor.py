"""Supervision of a run: a gang at a time, another one after a failure, a record of every attempt."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.connection import connect
from cluster.failures import GangStopped, RankFailed, StopForced
from cluster.gang import STOP_TIMEOUT_SEC, Gang, OnEvent
from conf.errors import SundogError
from conf.schema import RunConfig

ATTEMPTS = "attempts.jsonl"


class AttemptLog:
    """{run_dir}/attempts.jsonl: one line when an attempt starts and one when it ends, numbered over all commands."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ATTEMPTS
        self.attempt = max((record["attempt"] for record in read_attempts(run_dir)), default=0)

    def write(self, event: str, **facts: Any) -> None:
        record = {"attempt": self.attempt, "event": event, "time": time.time(), **facts}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # A line that a crash has cut off ends here, or it would swallow this one.
        cut = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
        with self._path.open("a") as file:
            file.write(("\n" if cut else "") + json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_attempts(run_dir: Path) -> list[dict[str, Any]]:
    """Return the records of a run's attempts, oldest first; a line cut off by a crash is left out."""
    path = run_dir / ATTEMPTS
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def supervise(
    config: RunConfig,
    function: str,
    *,
    on_event: OnEvent | None = None,
    stop: Callable[[], int] = lambda: 0,
    stop_timeout_sec: float = STOP_TIMEOUT_SEC,
) -> dict[str, Any]:
    """Run ``function`` on a gang until it ends; after a failure start another gang, ``cluster.max_restarts`` times.

    The function continues from its newest complete checkpoint by itself. ``stop()`` returns how often a stop was
    requested. Returns what rank 0 returned; a stop before the ranks had begun gives ``{"status": "stopped", "step"}``
    with the last step that was seen.

    Raises:
        SundogError: what a rank raised; user errors are not tried again.
        RankFailed: the last failure, when no restart is left or the same failure came twice without an event between.
        StopForced: the ranks had to be killed to stop them, or one failed while they were stopping.
    """
    log = AttemptLog(Path(config.run_dir))
    show = on_event or (lambda event: None)
    seen = _Seen(show)
    previous: RankFailed | None = None
    with connect(config.cluster):
        for restart in range(config.cluster.max_restarts + 1):
            log.attempt += 1
            seen.events = 0
            try:
                return _attempt(config, function, seen, stop, stop_timeout_sec, log)
            except GangStopped:
                log.write("stopped", step=seen.step)
                return {"status": "stopped", "step": seen.step}
            except RankFailed as failure:
                log.write("failed", rank=failure.rank, node=failure.node, message=failure.message, died=failure.died)
                if stop():
                    reason = f"rank {failure.rank} failed while stopping: {failure.message}"
                    fix = "the newest complete checkpoint stands, run the command again"
                    raise StopForced("stop", "", reason, fix) from failure
                again = previous is not None and not seen.events and previous.message == failure.message
                if restart == config.cluster.max_restarts or (again and not failure.died):
                    raise
                previous = failure
                show({"kind": "log", "message": f"{failure.args[0]}"})
                left = f"restart {restart + 1} of {config.cluster.max_restarts}"
                show({"kind": "log", "message": f"{left} from the newest complete checkpoint; log: {failure.log_path}"})
            except SundogError as error:
                log.write("error", message=str(error))
                raise
    raise AssertionError("the last attempt returns or raises")


class _Seen:
    """Passes events on, and remembers how many there were and the last step in them."""

    def __init__(self, show: OnEvent) -> None:
        self._show, self.events, self.step = show, 0, 0

    def __call__(self, event: dict[str, Any]) -> None:
        self.events += 1
        step = event.get("step")
        if isinstance(step, int):
            self.step = step
        self._show(event)


def _attempt(
    config: RunConfig,
    function: str,
    on_event: OnEvent,
    stop: Callable[[], int],
    stop_timeout_sec: float,
    log: AttemptLog,
) -> dict[str, Any]:
    run_dir = Path(config.run_dir)
    begun = time.monotonic()
    with Gang(
        config.cluster, name=run_dir.name, log_dir=run_dir / "logs", stop=stop, stop_timeout_sec=stop_timeout_sec
    ) as gang:
        ranks = [
            {"rank": rank, "host": seat.host, "ip": seat.ip, "pid": seat.pid} for rank, seat in enumerate(gang.seats)
        ]
        log.write("started", ranks=ranks, start_sec=round(time.monotonic() - begun, 3))
        result = gang.run(function, config, on_event)[0]
        assert isinstance(result, dict), f"{function} returned {type(result).__name__}, not a dict"
        log.write(str(result.get("status", "done")), step=result.get("step"))
        return result

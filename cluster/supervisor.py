"""Supervision of a run: a gang at a time, another one after a failure, a record of every attempt."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.connection import connect
from cluster.elastic import legal_sizes, with_ranks
from cluster.failures import GangStopped, RankFailed, StopForced
from cluster.gang import Gang
from cluster.metrics import RunMetrics
from cluster.placement import room_to_grow
from cluster.watch import STOP_TIMEOUT_SEC, OnEvent
from conf.errors import SundogError
from conf.schema import RunConfig

ATTEMPTS = "attempts.jsonl"


class AttemptLog:
    """{run_dir}/attempts.jsonl: one line when an attempt starts and one when it ends, numbered over all commands.

    The end of an attempt whose command was killed is written by the next command.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / ATTEMPTS
        records = read_attempts(run_dir)
        self.attempt = max((record["attempt"] for record in records), default=0)
        if records and records[-1]["event"] == "started":
            self.write("abandoned", message="its command was killed, and its ranks with it")

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
    """Run ``function`` on a gang until it ends; after a failure start another gang, at most ``cluster.max_restarts``
    times without a new checkpoint.

    The function continues from its newest complete checkpoint by itself. With ``cluster.min_ranks`` a gang has as many
    ranks as the cluster has room for, and one that is too small is replaced at a checkpoint when there is more.
    ``stop()`` returns how often a stop was requested. Returns what rank 0 returned; a stop before the ranks had begun
    gives ``{"status": "stopped", "step"}`` with the last step that was seen.

    Raises:
        SundogError: what a rank raised; user errors are not tried again.
        RankFailed: the last failure, when no restart is left or the same failure came twice without an event between.
        StopForced: the ranks had to be killed to stop them, or one failed while they were stopping.
    """
    with connect(config.cluster):
        return _Supervision(config, function, on_event or (lambda event: None), stop, stop_timeout_sec).run()


class _Supervision:
    def __init__(
        self, config: RunConfig, function: str, show: OnEvent, stop: Callable[[], int], stop_timeout_sec: float
    ) -> None:
        self._config, self._function, self._show = config, function, show
        self._stop, self._stop_timeout = stop, stop_timeout_sec
        self._log, self._sizes = AttemptLog(Path(config.run_dir)), legal_sizes(config)
        self._step = self._events = self._restarts = 0  # last step seen; since the start, since a checkpoint
        self._grow_to = 0
        self._previous: RankFailed | None = None
        self._metrics = RunMetrics(config.name)

    def run(self) -> dict[str, Any]:
        while True:
            self._log.attempt += 1
            self._events = self._grow_to = 0
            try:
                result = self._attempt()
                if result.get("status") != "stopped" or not self._grow_to or self._stop():
                    return result
                self._say(f"growing to {self._grow_to} ranks after step {result.get('step')}")
            except GangStopped:
                self._log.write("stopped", step=self._step)
                return {"status": "stopped", "step": self._step}
            except RankFailed as failure:
                self._after(failure)
            except SundogError as error:
                self._log.write("error", message=str(error))
                raise

    def _say(self, message: str) -> None:
        self._show({"kind": "log", "message": message})

    def _after(self, failure: RankFailed) -> None:
        """Record a failure, and raise unless another gang may do better."""
        most = self._config.cluster.max_restarts
        self._log.write(
            "failed", rank=failure.rank, node=failure.node, message=failure.message, died=failure.died, step=self._step
        )
        if self._stop():
            reason = f"rank {failure.rank} failed while stopping: {failure.message}"
            fix = "the newest complete checkpoint stands, run the command again"
            raise StopForced("stop", "", reason, fix) from failure
        again = self._previous is not None and not self._events and self._previous.message == failure.message
        if self._restarts == most or (again and not failure.died):
            raise failure
        self._restarts += 1
        self._previous = failure
        self._say(f"{failure.args[0]}")
        left = f"restart {self._restarts} of {most}"
        self._say(f"{left} from the newest complete checkpoint; log: {failure.log_path}")

    def _attempt(self) -> dict[str, Any]:
        config, begun = self._config, time.monotonic()
        run_dir = Path(config.run_dir)
        with Gang(
            config.cluster,
            name=run_dir.name,
            log_dir=run_dir / "logs",
            sizes=self._sizes,
            patient=self._previous is not None,
            stop=self._stop,
            stop_timeout_sec=self._stop_timeout,
        ) as gang:
            ranks = [
                {"rank": rank, "host": seat.host, "ip": seat.ip, "pid": seat.pid}
                for rank, seat in enumerate(gang.seats)
            ]
            self._log.write("started", ranks=ranks, start_sec=round(time.monotonic() - begun, 3))
            self._metrics.own(gang_ranks=len(ranks), gang_ranks_wanted=config.cluster.ranks)
            self._metrics.own(gang_attempts=self._log.attempt, gang_restarts=self._restarts)
            if len(ranks) < config.cluster.ranks:
                self._say(f"{len(ranks)} of {config.cluster.ranks} ranks: the cluster has no room for more")
            run_config = with_ranks(config, len(ranks))
            result = gang.run(self._function, run_config, lambda event: self._on_event(event, gang))[0]
            assert isinstance(result, dict), f"{self._function} returned {type(result).__name__}, not a dict"
            ended = "resized" if self._grow_to and result.get("status") == "stopped" else result.get("status", "done")
            self._log.write(str(ended), step=result.get("step"))
            return result

    def _on_event(self, event: dict[str, Any], gang: Gang) -> None:
        self._events += 1
        step = event.get("step")
        if isinstance(step, int):
            self._step = step
        self._metrics.event(event)
        self._show(event)
        if event.get("kind") == "checkpoint":
            self._restarts = 0
            if len(gang.seats) < self._config.cluster.ranks and not self._grow_to and not self._stop():
                self._grow_to = room_to_grow(self._config.cluster, len(gang.seats), self._sizes)
                if self._grow_to:
                    gang.cancel()

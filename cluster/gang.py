"""A gang: N ranks that start, run one function, and end together."""

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError
from ray.util import remove_placement_group
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster import logs
from cluster.failures import GangStopped, RankFailed, StopForced
from cluster.placement import place
from cluster.rendezvous import Seat, environments, one_host, seat_ranks
from cluster.worker import Outcome, Rank
from conf.errors import ResourceError
from conf.schema import ClusterConfig

OnEvent = Callable[[dict[str, Any]], None]

POLL_SEC = 1.0  # a poll of rank 0 waits this long for an event before it returns without one
WAIT_SEC = 0.2  # between two looks at the stop request
GRACE_SEC = 1.5  # after a first failure: a dead process is the cause, a broken connection its effect
STOP_TIMEOUT_SEC = 300.0  # from a stop request to the end of the step and its checkpoint
FINISH_TIMEOUT_SEC = 600.0  # from the first rank that has finished to the last
KILL_TIMEOUT_SEC = 10.0
CONTROL_THREADS = 4  # run, poll, cancel and dump_stacks at once


class Gang:
    """N ranks on one placement group of the connected cluster; a context manager that leaves none behind.

    ``stop()`` returns how often a stop was requested: 1 asks the ranks to checkpoint and end, 2 kills them.
    A gang runs once. After a failure its processes are gone; start another.
    """

    def __init__(
        self,
        cluster: ClusterConfig,
        *,
        name: str = "run",
        log_dir: Path | None = None,
        stop: Callable[[], int] = lambda: 0,
        stop_timeout_sec: float = STOP_TIMEOUT_SEC,
    ) -> None:
        self.seats: list[Seat] = []  # in rank order, once started
        self._cluster, self._name = cluster, f"sundog-{name}-{secrets.token_hex(3)}"
        self._log_dir = log_dir.absolute() if log_dir else None
        self._stop, self._stop_timeout = stop, stop_timeout_sec
        self._cancelled = threading.Event()
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []  # in rank order, once started

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self) -> None:
        """Ask all ranks to stop; safe in a signal handler and in any thread."""
        self._cancelled.set()

    def _stops(self) -> int:
        return max(int(self._stop()), int(self._cancelled.is_set()))

    def _start(self) -> None:
        cluster = self._cluster
        deadline = time.monotonic() + cluster.start_timeout_sec
        self._group = place(cluster, self._name, lambda: self._stops() > 0)
        for index in range(cluster.ranks):
            # One rank alone is never restarted: its peers would wait for one that no longer knows them.
            options = {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": CONTROL_THREADS}
            strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index)
            actor = ray.remote(Rank).options(
                num_cpus=cluster.cpus_per_rank,
                num_gpus=cluster.gpus_per_rank,
                scheduling_strategy=strategy,
                name=f"{self._name}-{index}",
                **options,
            )
            self._actors.append(actor.remote())
        by_bundle: list[Seat] = self._all(
            [actor.seat.remote(index) for index, actor in enumerate(self._actors)], deadline
        )
        self.seats = seat_ranks(by_bundle)
        self._actors = [self._actors[seat.index] for seat in self.seats]
        port = self._all([self._actors[0].hold_port.remote()], deadline)[0]
        threads = cluster.threads_per_rank or max(int(cluster.cpus_per_rank), 1)
        log_dir = str(self._log_dir or "")
        prepared = [
            actor.prepare.remote(environment, os.getcwd(), log_dir)
            for actor, environment in zip(self._actors, environments(self.seats, port, threads), strict=True)
        ]
        self._all(prepared, deadline)

    def _all(self, refs: list[Any], deadline: float) -> list[Any]:
        """Return what all calls return; look at the stop request while waiting."""
        waiting = refs
        while waiting:
            ready, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=WAIT_SEC)
            for ref in ready:
                try:
                    ray.get(ref)
                except RayError as error:
                    place_in = refs.index(ref)
                    node = self.seats[place_in].host if self.seats else "its node"
                    reason = str(error).strip().splitlines()[-1]
                    raise RankFailed(place_in, node, f"did not start: {reason}", "", "", died=True) from error
            if waiting and self._stops():
                raise GangStopped
            if waiting and time.monotonic() > deadline:
                raise ResourceError(
                    "cluster.start_timeout_sec",
                    self._cluster.start_timeout_sec,
                    f"{len(waiting)} of {len(refs)} ranks did not start in time",
                    "a larger cluster.start_timeout_sec, or look at `ray list actors`",
                )
        return ray.get(refs)

    def run(self, function: str, config: Any, on_event: OnEvent | None = None) -> list[Any]:
        """Call ``function(config, control)`` on every rank; return the results in rank order.

        Events that rank 0 emits go to ``on_event``, in order, in this thread.

        Raises:
            SundogError: what a rank raised, as it was raised.
            RankFailed: the first rank that failed otherwise. All ranks are dead by then.
            StopForced: a stop was asked for twice, or the ranks did not end in time after the first.
        """
        return _Watch(self, function, config, on_event or (lambda event: None)).results()

    def close(self) -> None:
        """Kill what still runs, wait until it is gone, and free the reservation."""
        for actor in self._actors:
            with suppress(RayError, ValueError):
                ray.kill(actor, no_restart=True)
        if self._group is not None:
            with suppress(RayError, ValueError):
                remove_placement_group(self._group)
            self._group = None
        if self.seats and one_host(self.seats) and self.seats[0].ip == ray.util.get_node_ip_address():
            _await_death([seat.pid for seat in self.seats])
        self._actors = []


class _Watch:
    """One run of a gang, watched from the driver."""

    def __init__(self, gang: Gang, function: str, config: Any, on_event: OnEvent) -> None:
        self._gang, self._on_event = gang, on_event
        self._running = {actor.run.remote(function, config): rank for rank, actor in enumerate(gang._actors)}
        self._poll: Any = gang._actors[0].poll.remote(POLL_SEC)
        self._done: dict[int, Outcome] = {}
        self._finish_by = self._stop_by = float("inf")

    def results(self) -> list[Any]:
        while self._running:
            refs = [*self._running, *([self._poll] if self._poll is not None else [])]
            ready, _ = ray.wait(refs, num_returns=1, timeout=WAIT_SEC)
            if self._poll in ready:
                self._deliver(again=True)
            for ref in ready:
                if ref in self._running:
                    self._collect(ref)
            failed = {rank: outcome for rank, outcome in self._done.items() if not outcome.ok}
            if failed:
                self._fail(failed)
            if self._done and self._finish_by == float("inf"):
                self._finish_by = time.monotonic() + FINISH_TIMEOUT_SEC
            self._mind_the_clock()
        self._deliver(again=False)
        return [self._done[rank].value for rank in range(len(self._done))]

    def _collect(self, ref: Any) -> None:
        rank = self._running.pop(ref)
        try:
            self._done[rank] = ray.get(ref)
        except RayError as error:
            reason = getattr(error, "error_msg", "") or str(error)
            told = next((line.strip() for line in reason.splitlines() if "exit" in line.lower()), "no reason known")
            self._done[rank] = Outcome(message=f"its process died ({told[:200]})", time=-1.0)

    def _deliver(self, again: bool) -> None:
        """Hand the events of the outstanding poll to the callback; ``again`` starts the next poll."""
        try:
            polls = [self._poll] if self._poll is not None else []
            if not again:
                polls.append(self._gang._actors[0].poll.remote(0.0))
            for poll in polls:
                for event in ray.get(poll, timeout=KILL_TIMEOUT_SEC):
                    self._on_event(event)
            self._poll = self._gang._actors[0].poll.remote(POLL_SEC) if again else None
        except (RayActorError, GetTimeoutError):
            self._poll = None  # rank 0 is dead; its run says so

    def _fail(self, failed: dict[int, Outcome]) -> None:
        """Raise the first failure, after a short wait for one that explains it better."""
        user_error = next((outcome.error for outcome in failed.values() if outcome.error is not None), None)
        deadline = time.monotonic() + GRACE_SEC
        while user_error is None and self._running and all(outcome.time >= 0 for outcome in failed.values()):
            ready, _ = ray.wait(list(self._running), num_returns=1, timeout=max(deadline - time.monotonic(), 0))
            if not ready:
                break
            rank = self._running[ready[0]]
            self._collect(ready[0])
            if not self._done[rank].ok:
                failed[rank] = self._done[rank]
                user_error = self._done[rank].error
        if 0 in self._done and self._done[0].time >= 0:
            self._deliver(again=False)
        if user_error is not None:
            raise user_error
        rank = min(failed, key=lambda rank: failed[rank].time)
        self._raise(rank, failed[rank].message, died=failed[rank].time < 0, trace=failed[rank].trace)

    def _raise(self, rank: int, message: str, died: bool, trace: str = "") -> None:
        gang = self._gang
        path = logs.log_path(gang._log_dir, rank) if gang._log_dir else None
        tail = logs.tail(path) or trace.strip()
        raise RankFailed(rank, gang.seats[rank].host, message, str(path or ""), tail, died)

    def _mind_the_clock(self) -> None:
        stops, now = self._gang._stops(), time.monotonic()
        if stops and self._stop_by == float("inf"):
            self._stop_by = now + self._gang._stop_timeout
            for actor in self._gang._actors:
                actor.cancel.remote()
        if self._running and (stops > 1 or now > self._stop_by):
            if stops > 1:
                rule, fix = "asked twice: the ranks were killed before they could checkpoint", "ask once and wait"
            else:
                self._dump_stacks()
                rule = f"the ranks did not end within {self._gang._stop_timeout:g} s and were killed"
                fix = "their logs say where they were"
            raise StopForced("stop", "", rule, f"{fix}; the newest complete checkpoint stands, run the command again")
        if self._running and now > self._finish_by:
            self._dump_stacks()
            late = min(self._running.values())
            self._raise(late, f"did not end within {FINISH_TIMEOUT_SEC:g} s of rank {min(self._done)}", died=False)

    def _dump_stacks(self) -> None:
        refs = [self._gang._actors[rank].dump_stacks.remote() for rank in self._running.values()]
        ray.wait(refs, num_returns=len(refs), timeout=KILL_TIMEOUT_SEC)


def _await_death(pids: list[int]) -> None:
    """Wait until the processes are gone, so that a next attempt never writes beside an old one; insist if need be."""
    deadline = time.monotonic() + KILL_TIMEOUT_SEC
    pause = threading.Event()
    insisted = False
    while remaining := [pid for pid in pids if _runs(pid)]:
        if time.monotonic() > deadline:
            if insisted:
                return
            for pid in remaining:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            insisted, deadline = True, time.monotonic() + KILL_TIMEOUT_SEC
        pause.wait(0.05)


def _runs(pid: int) -> bool:
    """Return whether ``pid`` is a live process that is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False

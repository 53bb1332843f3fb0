"""A running gang, watched from the driver: events, the first failure, ranks that hang or do not stop."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError

from cluster import logs
from cluster.failures import RankFailed, StopForced
from cluster.processes import dump_stacks, on_hosts
from cluster.rendezvous import Seat
from cluster.worker import Outcome

OnEvent = Callable[[dict[str, Any]], None]

POLL_SEC = 1.0  # a poll of rank 0 waits this long for an event before it returns without one
WAIT_SEC = 0.2  # between two looks at the stop request
GRACE_SEC = 1.5  # after a first failure: a dead process is the cause, a broken connection its effect
STOP_TIMEOUT_SEC = 300.0  # from a stop request to the end of the step and its checkpoint
FINISH_TIMEOUT_SEC = 600.0  # from the first rank that has finished to the last
ANSWER_TIMEOUT_SEC = 10.0
FROZEN = "T"  # state of a process that a signal has stopped


class Watch:
    """One run of a gang, watched from the driver."""

    def __init__(
        self,
        actors: Sequence[Any],
        seats: Sequence[Seat],
        *,
        log_dir: Path | None,
        stops: Callable[[], int],
        stop_timeout_sec: float,
        hang_timeout_sec: float,
        on_event: OnEvent,
    ) -> None:
        self._actors, self._seats, self._log_dir, self._on_event = actors, seats, log_dir, on_event
        self._stops, self._stop_timeout, self._hang_timeout = stops, stop_timeout_sec, hang_timeout_sec
        self._running: dict[Any, int] = {}
        self._poll: Any = None
        self._done: dict[int, Outcome] = {}
        self._finish_by = self._stop_by = float("inf")
        self._idle_calls: dict[Any, int] = {}
        self._progress = [time.monotonic()] * len(actors)  # of each rank, when it last told of some
        self._look_at = time.monotonic()

    def results(self, function: str, config: Any) -> list[Any]:
        """Call ``function(config, control)`` on all ranks; see ``Gang.run``."""
        self._running = {actor.run.remote(function, config): rank for rank, actor in enumerate(self._actors)}
        self._poll = self._actors[0].poll.remote(POLL_SEC)
        self._progress = [time.monotonic()] * len(self._actors)
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
            self._look_for_hangs()
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
                polls.append(self._actors[0].poll.remote(0.0))
            for poll in polls:
                for event in ray.get(poll, timeout=ANSWER_TIMEOUT_SEC):
                    self._on_event(event)
            self._poll = self._actors[0].poll.remote(POLL_SEC) if again else None
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
        if all(outcome.time >= 0 for outcome in failed.values()) and self._running:
            self._blame_frozen(self._dump_stacks())
        rank = min(failed, key=lambda rank: failed[rank].time)
        self._raise(rank, failed[rank].message, died=failed[rank].time < 0, trace=failed[rank].trace)

    def _raise(self, rank: int, message: str, died: bool, trace: str = "") -> None:
        path = logs.log_path(self._log_dir, rank) if self._log_dir else None
        tail = logs.tail(path) or trace.strip()
        raise RankFailed(rank, self._seats[rank].host, message, str(path or ""), tail, died)

    def _mind_the_clock(self) -> None:
        stops, now = self._stops(), time.monotonic()
        if stops and self._stop_by == float("inf"):
            self._stop_by = now + self._stop_timeout
            for actor in self._actors:
                actor.cancel.remote()
        if self._running and (stops > 1 or now > self._stop_by):
            if stops > 1:
                rule, fix = "asked twice: the ranks were killed before they could checkpoint", "ask once and wait"
            else:
                self._dump_stacks()
                rule = f"the ranks did not end within {self._stop_timeout:g} s and were killed"
                fix = "their logs say where they were"
            raise StopForced("stop", "", rule, f"{fix}; the newest complete checkpoint stands, run the command again")
        if self._running and now > self._finish_by:
            self._dump_stacks()
            late = min(self._running.values())
            self._raise(late, f"did not end within {FINISH_TIMEOUT_SEC:g} s of rank {min(self._done)}", died=False)

    def _look_for_hangs(self) -> None:
        """Raise RankFailed if a rank has told of no progress for too long; it may have stopped to answer at all."""
        now = time.monotonic()
        ready, _ = ray.wait(list(self._idle_calls), num_returns=len(self._idle_calls), timeout=0)
        for ref in ready:
            rank = self._idle_calls.pop(ref)
            try:
                self._progress[rank] = max(self._progress[rank], now - ray.get(ref))
            except RayError:
                continue  # it is dead; its run says so
        if now >= self._look_at:
            asked = set(self._idle_calls.values())
            free = [rank for rank in self._running.values() if rank not in asked]
            self._idle_calls |= {self._actors[rank].idle.remote(): rank for rank in free}
            self._look_at = now + min(self._hang_timeout / 10, ANSWER_TIMEOUT_SEC)
        hung = [rank for rank in self._running.values() if now - self._progress[rank] > self._hang_timeout]
        if hung:
            states = self._dump_stacks()
            self._blame_frozen(states)
            rank = min(hung, key=lambda rank: self._progress[rank])
            idle = f"no progress for {now - self._progress[rank]:.0f} s (cluster.hang_timeout_sec)"
            self._raise(rank, f"{idle}; the stacks of ranks {sorted(states)} are in their logs", died=True)

    def _blame_frozen(self, states: dict[int, str]) -> None:
        """A stopped process is the cause wherever there is one: its peers only wait for it."""
        for rank, letter in sorted(states.items()):
            if letter.upper() == FROZEN:
                self._raise(rank, "its process was stopped by a signal, and all ranks waited for it", died=True)

    def _dump_stacks(self) -> dict[int, str]:
        """Have all running ranks write their stacks into their logs; return the state that each was found in."""
        ranks = sorted(self._running.values())
        found = on_hosts([self._seats[rank] for rank in ranks], dump_stacks)
        return {ranks[index]: letter for index, letter in found.items()}

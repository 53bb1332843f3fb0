"""A timeline of attention calls on one rank: when it computed, when it waited, which messages were under way.

    with recording() as recorder:
        out = attend(...)
    recorder.waited, recorder.calls

Outside of :func:`recording` the engine asks once a call whether anybody records, and that is all it costs. Times are
the host's, in seconds since the call began; a rank that has sent or received knows it when it next waits for it.
"""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from parallel.ring.channel import Arrival, Channel, Parcels
from parallel.ring.schedule import Compute, Direction

Activity = Literal["compute", "wait", "send", "receive"]


class Span(NamedTuple):
    activity: Activity
    start: float
    end: float


@dataclass
class TracedCall:
    """One run of a schedule on this rank."""

    direction: Direction
    began: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list)

    def now(self) -> float:
        return time.perf_counter() - self.began

    def add(self, activity: Activity, start: float) -> None:
        self.spans.append(Span(activity, start, self.now()))


class Recorder:
    """The calls of this process while it records."""

    def __init__(self) -> None:
        self.calls: list[TracedCall] = []

    @property
    def waited(self) -> float:
        """Seconds in which this rank waited for messages: communication that no computing hid."""
        return sum(s.end - s.start for call in self.calls for s in call.spans if s.activity == "wait")

    def watch(self, direction: Direction, worker: Any, channel: Channel | None) -> tuple[Any, Channel | None]:
        """The worker and the channel of a call that begins now, watched."""
        call = TracedCall(direction)
        self.calls.append(call)
        return _Worker(worker, call), None if channel is None else _Channel(channel, call)


class _Worker:
    def __init__(self, worker: Any, call: TracedCall) -> None:
        self._worker, self._call = worker, call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._worker, name)

    def compute(self, block: Compute) -> None:
        start = self._call.now()
        self._worker.compute(block)
        self._call.add("compute", start)


class _Arrival:
    def __init__(self, arrival: Arrival, call: TracedCall) -> None:
        self._arrival, self._call, self._posted = arrival, call, call.now()

    def wait(self) -> Any:
        start = self._call.now()
        tensor = self._arrival.wait()
        self._call.add("wait", start)
        self._call.add("receive", self._posted)
        return tensor


class _Channel:
    def __init__(self, channel: Channel, call: TracedCall) -> None:
        self._channel, self._call, self.early = channel, call, channel.early
        self._posted: deque[float | None] = deque()  # when each lot was sent; None for an empty one

    def receive(self, peer: int, tensors: Sequence[Any]) -> list[Arrival]:
        return [_Arrival(arrival, self._call) for arrival in self._channel.receive(peer, tensors)]

    def send(self, parcels: Parcels) -> None:
        self._posted.append(self._call.now() if parcels else None)
        self._channel.send(parcels)

    def finish_sends(self, keep: int = 0) -> None:
        start = self._call.now()
        self._channel.finish_sends(keep)
        lots = [self._posted.popleft() for _ in range(len(self._posted) - keep)]
        finished = [posted for posted in lots if posted is not None]
        if finished:
            self._call.add("wait", start)
        for posted in finished:
            self._call.add("send", posted)


_recorder: Recorder | None = None


def current() -> Recorder | None:
    """Who records now, if anybody does."""
    return _recorder


@contextmanager
def recording() -> Iterator[Recorder]:
    """Record all attention calls of this process, backward ones too, until the block ends."""
    global _recorder
    before, _recorder = _recorder, Recorder()
    try:
        yield _recorder
    finally:
        _recorder = before

"""Links of a set bandwidth without any privilege: a token bucket in the channel.

The ranks of one machine share a table of when each directed link is free again. Who sends reserves the links on the
message's way, one message after the other, and notes when the last byte would have arrived; sender and receiver both
wait until then. What the sockets below really do takes less time and is not seen.
"""

import fcntl
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from parallel.plan.topology import Topology
from parallel.ring.channel import Arrival, Channel, Parcels

SLOTS = 1024  # notes of messages on their way between two ranks


class Bucket:
    """The shared table, in a file; ``clock`` and ``sleep`` stand for :mod:`time` in tests."""

    def __init__(
        self,
        file: Path,
        topology: Topology,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        links, pairs = len(topology.bandwidth), topology.size**2
        self._topology, self._clock, self._sleep = topology, clock, sleep
        self._lock = open(f"{file}.lock", "a")  # noqa: SIM115 (held as long as this object)
        with self._locked():
            if not file.exists():
                file.write_bytes(bytes(8 * (links + pairs * SLOTS)))
        table = np.memmap(file, np.float64, "r+")
        self._free, self._due = table[:links], table[links:].reshape(topology.size, topology.size, SLOTS)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._lock, fcntl.LOCK_UN)

    def reserve(self, source: int, target: int, size: int, number: int) -> float:
        """Take the links for ``size`` bytes; returns when the last one arrives, and notes it for the receiver."""
        ends = (np.array([source]), np.array([target]))
        links = np.setdiff1d(self._topology.paths(*ends)[0], len(self._free) - 1)
        with self._locked():
            begin = max(self._clock(), float(self._free[links].max()))
            ready = begin + size / float(self._topology.bandwidth[links].min())
            self._free[links] = ready
            due = ready + float(self._topology.latency(*ends)[0])
            self._due[source, target, number % SLOTS] = due
        return due

    def arrival(self, source: int, target: int, number: int) -> float:
        return float(self._due[source, target, number % SLOTS])

    def wait_until(self, due: float) -> None:
        left = due - self._clock()
        if left > 0:
            self._sleep(left)


class Pace:
    """One rank's side: counts its messages, over all of its channels."""

    def __init__(self, bucket: Bucket, rank: int) -> None:
        self.bucket, self.rank = bucket, rank
        self._numbers: Counter[tuple[int, int]] = Counter()

    def number(self, source: int, target: int) -> int:
        """How many messages there were between two ranks before this one."""
        self._numbers[source, target] += 1
        return self._numbers[source, target] - 1

    def channel(self, inner: Channel) -> "PacedChannel":
        return PacedChannel(inner, self)


class _PacedArrival:
    def __init__(self, inner: Arrival, pace: Pace, peer: int) -> None:
        self._inner, self._pace = inner, pace
        self._message = (peer, pace.rank, pace.number(peer, pace.rank))

    def wait(self) -> Any:
        tensor = self._inner.wait()
        self._pace.bucket.wait_until(self._pace.bucket.arrival(*self._message))
        return tensor


class PacedChannel:
    """A channel whose messages take as long as the bucket's links say."""

    def __init__(self, inner: Channel, pace: Pace) -> None:
        self._inner, self._pace, self.early = inner, pace, inner.early
        self._left: deque[float] = deque()  # when the last of each lot has left

    def receive(self, peer: int, tensors: Sequence[Any]) -> list[Arrival]:
        return [_PacedArrival(arrival, self._pace, peer) for arrival in self._inner.receive(peer, tensors)]

    def send(self, parcels: Parcels) -> None:
        left = 0.0
        for peer, tensor in parcels:
            number = self._pace.number(self._pace.rank, peer)
            due = self._pace.bucket.reserve(self._pace.rank, peer, tensor.nbytes, number)
            left = max(left, due)
        self._left.append(left)
        self._inner.send(parcels)

    def finish_sends(self, keep: int = 0) -> None:
        self._inner.finish_sends(keep)
        while len(self._left) > keep:
            self._pace.bucket.wait_until(self._left.popleft())

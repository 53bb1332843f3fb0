"""Runs a schedule: one loop for every strategy, forward and backward.

The loop moves tensors and waits; a worker says what an input, a block and a sum are in its direction. Where shards
travel hop by hop, a rank holds its own tensors, the inputs of the current block and those arriving for the next, and
likewise two sums in flight: the extra memory does not grow with the number of ranks.
"""

from functools import lru_cache

from torch import Tensor

from parallel.ring import trace
from parallel.ring.channel import Arrival, Channel
from parallel.ring.problem import Segments
from parallel.ring.schedule import INPUTS, Kind, Message, Schedule, Step, Strategy, exchange
from parallel.ring.workers import Backward, Forward, Rules, Shards, Worker


@lru_cache(maxsize=1024)
def last_uses(schedule: Schedule, rank: int) -> tuple[tuple[Message, ...], ...]:
    """For each step the received inputs that no later step uses."""
    last: dict[tuple[Kind, int, int], int] = {}
    for index, step in enumerate(schedule.ranks[rank]):
        used: list[tuple[Kind, int, Segments]] = []
        used.extend((message.kind, message.owner, message.segments) for message in step.sends)
        for block in step.computes:
            used.append(("query", block.queries, block.query_segments))
            used.append(("keys", block.keys, block.key_segments))
        last |= {(kind, owner, segment): index for kind, owner, segments in used for segment in segments}
    dead: list[list[Message]] = [[] for _ in schedule.ranks[rank]]
    for index, step in enumerate(schedule.ranks[rank]):
        for message in step.receives:
            if message.kind in INPUTS:
                uses = [last.get((message.kind, message.owner, segment), index) for segment in message.segments]
                dead[max(uses)].append(message)
    return tuple(tuple(messages) for messages in dead)


class _Run:
    """The arrivals of one call and the waiting for them."""

    def __init__(self, worker: Worker, channel: Channel | None, steps: tuple[Step, ...], window: int) -> None:
        self._worker, self._channel, self._steps = worker, channel, steps
        self._leaving = 2 * window - 1  # exchanges whose sends may be on their way when the next one begins
        self._ahead = self._leaving - 1 if channel is not None and channel.early else 0
        self._posted = 0  # exchanges whose receives are posted
        self._coming: dict[int, list[tuple[Message, list[Arrival]]]] = {}  # of exchanges that have not begun
        self._inputs: dict[tuple[Kind, int], list[tuple[Message, list[Arrival]]]] = {}
        self._sums: dict[Message, list[Arrival]] = {}

    def _post_receives(self, channel: Channel, number: int) -> None:
        """Those of an exchange, and of all whose sends may be on their way together with its own: where messages go
        both ways between two ranks at once, the note that one is ready to receive would else wait behind what it
        sends, and the directions would take turns."""
        for coming in range(self._posted, min(number + self._ahead + 1, 2 * len(self._steps))):
            self._coming[coming] = [
                (message, channel.receive(message.peer, self._worker.room(message)))
                for message in self._steps[coming // 2].receives
                if exchange(coming // 2, message) == coming
            ]
            self._posted = coming + 1
        for message, arrivals in self._coming.pop(number):
            if message.kind in INPUTS:
                self._inputs.setdefault((message.kind, message.owner), []).append((message, arrivals))
            else:
                self._sums[message] = arrivals

    def _exchange(self, number: int) -> None:
        """The messages of a step that are sums, or those that are inputs."""
        if self._channel is None:
            return
        self._channel.finish_sends(self._leaving)
        self._post_receives(self._channel, number)
        parcels: list[tuple[int, Tensor]] = []
        for message in self._steps[number // 2].sends:
            if exchange(number // 2, message) == number:
                if message.kind in INPUTS:
                    self._await_inputs(message.kind, message.owner, message.segments)
                parcels += [(message.peer, tensor) for tensor in self._worker.outgoing(message)]
        self._channel.send(parcels)

    def _await_inputs(self, kind: Kind, owner: int, segments: Segments) -> None:
        waiting = self._inputs.get((kind, owner), [])
        for entry in [entry for entry in waiting if not set(segments).isdisjoint(entry[0].segments)]:
            waiting.remove(entry)
            self._worker.take_in(entry[0], [arrival.wait() for arrival in entry[1]])

    def step(self, index: int, dead: tuple[Message, ...]) -> None:
        step = self._steps[index]
        self._exchange(2 * index)
        self._exchange(2 * index + 1)
        for block in step.computes:
            self._await_inputs("query", block.queries, block.query_segments)
            self._await_inputs("keys", block.keys, block.key_segments)
            self._worker.compute(block)
        for message in step.merges:
            tensors = [arrival.wait() for arrival in self._sums.pop(message)]
            self._worker.add(message.kind, message.owner, message.segments, message.heads, tensors)
        for message in dead:
            self._await_inputs(message.kind, message.owner, message.segments)
            self._worker.drop(message)


def run(schedule: Schedule, worker: Worker, channel: Channel | None) -> None:
    """Execute a rank's steps; ``worker`` holds the results afterwards."""
    rank, recorder = worker.rules.rank, trace.current()
    if recorder is not None:
        worker, channel = recorder.watch(schedule.direction, worker, channel)
    execution = _Run(worker, channel, schedule.ranks[rank], schedule.window)
    for index, dead in enumerate(last_uses(schedule, rank)):
        execution.step(index, dead)
    if channel is not None:
        channel.finish_sends()


def forward(strategy: Strategy, rules: Rules, shards: Shards, channel: Channel | None) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of this rank's queries over all ranks' keys, ``out`` in the dtype of the queries."""
    worker = Forward(rules, shards)
    run(strategy.forward(rules.scene.problem), worker, channel)
    out, lse = worker.result()
    return out.to(shards.q.dtype), lse


def backward(
    strategy: Strategy, rules: Rules, shards: Shards, out: Tensor, lse: Tensor, d_out: Tensor, channel: Channel | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``(dq, dk, dv)`` of this rank's shards, in their dtypes, from the gradient of ``out``."""
    worker = Backward(rules, shards, out, lse, d_out)
    run(strategy.backward(rules.scene.problem), worker, channel)
    dq, dk, dv = worker.result()
    return dq.to(shards.q.dtype), dk.to(shards.k.dtype), dv.to(shards.v.dtype)

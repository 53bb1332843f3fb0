"""Sequence parallelism as data: for every rank the steps of one attention call, forward or backward.

Ranks own shards of queries and of keys-and-values. A strategy says which of them travel where and when, and where each
block is computed; :mod:`parallel.ring.check` proves a schedule right without running it and
:mod:`parallel.ring.engine` runs it. Nothing here knows tensors.

What travels is part of a shard: some of its segments (:mod:`parallel.ring.problem`), for some of the heads. Two sorts
of things travel:

- inputs (``query``, ``keys``): copied when sent. In a backward schedule ``query`` stands for the queries together with
  the gradient of their output, their lse and their delta.
- sums (``out`` with its lse, ``dquery``, ``dkeys``): moved when sent, added to what the receiver has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from parallel.ring.problem import Heads, Problem, Segments, Side

Kind = Literal["query", "keys", "out", "dquery", "dkeys"]
Direction = Literal["forward", "backward"]
INPUTS: tuple[Kind, ...] = ("query", "keys")
SUMS: dict[str, tuple[Kind, ...]] = {"forward": ("out",), "backward": ("dquery", "dkeys")}


@dataclass(frozen=True)
class Message:
    """Part of what belongs to ``owner``'s shard, to (in a rank's sends) or from (in its receives) ``peer``.

    A sum that travels on after others were added to it is ``wide``: it keeps the dtype of accumulation, or every hop
    would round it.
    """

    kind: Kind
    owner: int
    segments: Segments
    heads: Heads
    peer: int
    wide: bool = False


def exchange(step: int, message: Message) -> int:
    """Which exchange a message of a step belongs to, counted through all steps: sums before inputs."""
    return 2 * step + (message.kind in INPUTS)


@dataclass(frozen=True)
class Compute:
    """One block: segments of one shard's queries against segments of one shard's keys. Both are at hand, and what comes
    out is added to the sums of their owners that this rank holds."""

    queries: int
    query_segments: Segments
    keys: int
    key_segments: Segments
    heads: Heads


@dataclass(frozen=True)
class Step:
    """What a rank does in one turn: it exchanges sums, exchanges inputs, computes, and adds the received sums named in
    ``merges``. An exchange lets earlier sends of its sort finish (:attr:`Schedule.window`), posts the receives, then
    the sends. Sums go first, so that no result waits for an input: neither for one that has to come before it can be
    passed on, nor for one that is still leaving. Inputs are waited for where they are used or passed on, sums where
    they are merged."""

    receives: tuple[Message, ...] = ()
    sends: tuple[Message, ...] = ()
    computes: tuple[Compute, ...] = ()
    merges: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """The steps of every rank; all ranks have equally many.

    ``window``: an exchange begins when what was sent in the same exchange that many steps before has left. With 1 a
    rank holds one block that leaves and one that arrives; more lets many links carry at once, for more memory.
    """

    direction: Direction
    problem: Problem
    ranks: tuple[tuple[Step, ...], ...]
    window: int = 1

    def messages(self) -> Iterator[tuple[int, int, Message]]:
        """``(step, sending rank, message)`` of all sends."""
        for rank, steps in enumerate(self.ranks):
            for index, step in enumerate(steps):
                yield from ((index, rank, message) for message in step.sends)

    @property
    def haul(self) -> int:
        """Tokens times the links of a ring of ranks that they travel, whatever the kind."""
        total, size = 0, self.problem.world_size
        for _, rank, message in self.messages():
            side: Side = "keys" if message.kind in ("keys", "dkeys") else "query"
            distance = (rank - message.peer) % size
            total += self.problem.tokens(side, message.owner, message.segments) * min(distance, size - distance)
        return total


Build = Callable[[Problem, Direction], Schedule]


@dataclass(frozen=True)
class Strategy:
    """How to make the forward and the backward schedule of a problem; ``single`` ones run on one rank only."""

    name: str
    forward: Callable[[Problem], Schedule]
    backward: Callable[[Problem], Schedule]
    single: bool = False


@dataclass
class _DraftStep:
    receives: list[Message] = field(default_factory=list)
    sends: list[Message] = field(default_factory=list)
    computes: list[Compute] = field(default_factory=list)
    merges: list[Message] = field(default_factory=list)


class Draft:
    """Collects transfers and computes by step and rank; both ends of a transfer are written at once."""

    def __init__(self, problem: Problem, direction: Direction, window: int = 1) -> None:
        self.problem, self.window = problem, window
        self.direction: Direction = direction
        self._ranks: list[list[_DraftStep]] = [[] for _ in range(problem.world_size)]

    @property
    def steps(self) -> int:
        """How many there are so far."""
        return len(self._ranks[0])

    def _step(self, rank: int, index: int) -> _DraftStep:
        if index >= self.steps:
            for steps in self._ranks:
                steps += [_DraftStep() for _ in range(index + 1 - len(steps))]
        return self._ranks[rank][index]

    def transfer(self, step: int, source: int, message: Message, merge: int | None = None) -> None:
        """Send in ``step`` from ``source`` to the message's peer; a sum is merged there in step ``merge``."""
        target = message.peer
        self._step(source, step).sends.append(message)
        received = Message(message.kind, message.owner, message.segments, message.heads, source, message.wide)
        self._step(target, step).receives.append(received)
        if merge is not None:
            self._step(target, merge).merges.append(received)

    def compute(self, step: int, rank: int, block: Compute) -> None:
        self._step(rank, step).computes.append(block)

    def merges(self, rank: int) -> bool:
        """Whether sums of this rank's come in from others."""
        return any(step.merges for step in self._ranks[rank])

    def finish(self) -> Schedule:
        ranks = tuple(
            tuple(Step(tuple(s.receives), tuple(s.sends), tuple(s.computes), tuple(s.merges)) for s in steps)
            for steps in self._ranks
        )
        return Schedule(self.direction, self.problem, ranks, self.window)

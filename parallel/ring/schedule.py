"""Sequence parallelism as data: for every rank the steps of one attention call, forward or backward.

Ranks own shards of queries and of keys-and-values. A strategy says which of them travel where and when, and where each
block is computed; :mod:`parallel.ring.check` proves a schedule right without running it and
:mod:`parallel.ring.engine` runs it. Nothing here knows tensors.

A shard is made of the chunks of :mod:`parallel.layout`, and everything that travels is a range of the owner's chunks.
Two sorts of things travel:

- inputs (``query``, ``keys``): copied when sent. In a backward schedule ``query`` stands for the queries together with
  the gradient of their output, their lse and their delta.
- sums (``out`` with its lse, ``dquery``, ``dkeys``): moved when sent, added to what the receiver has.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

from parallel.layout import chunks

Kind = Literal["query", "keys", "out", "dquery", "dkeys"]
Direction = Literal["forward", "backward"]
INPUTS: tuple[Kind, ...] = ("query", "keys")
SUMS: dict[str, tuple[Kind, ...]] = {"forward": ("out",), "backward": ("dquery", "dkeys")}


class Parts(NamedTuple):
    """The chunks ``[start, stop)`` of a shard, counted inside the shard."""

    start: int
    stop: int

    def union(self, other: "Parts") -> "Parts":
        """The smallest range that holds both."""
        return Parts(min(self.start, other.start), max(self.stop, other.stop))

    def covers(self, other: "Parts") -> bool:
        return self.start <= other.start and other.stop <= self.stop

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Message:
    """Part of what belongs to ``owner``'s shard, to (in a rank's sends) or from (in its receives) ``peer``."""

    kind: Kind
    owner: int
    parts: Parts
    peer: int


@dataclass(frozen=True)
class Compute:
    """One block: chunks of one shard's queries against chunks of one shard's keys. Both are at hand, and what comes out
    is added to the sums of their owners that this rank holds."""

    queries: int
    query_parts: Parts
    keys: int
    key_parts: Parts


@dataclass(frozen=True)
class Step:
    """What a rank does between two points of communication, in this order: it lets the sends of its previous step
    finish, posts the receives, posts the sends (an input that is still on its way is waited for), computes, and adds
    the received sums named in ``merges``. Inputs are waited for where they are used, sums where they are merged."""

    receives: tuple[Message, ...] = ()
    sends: tuple[Message, ...] = ()
    computes: tuple[Compute, ...] = ()
    merges: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Problem:
    """What has to be computed: every visible pair of a query chunk and a key chunk, once."""

    world_size: int
    layout: str
    causal: bool

    def chunks(self, rank: int) -> tuple[int, ...]:
        return chunks(self.world_size, rank, self.layout)

    @cached_property
    def whole(self) -> Parts:
        return Parts(0, len(self.chunks(0)))

    def visible(self, query_chunk: int, key_chunk: int) -> bool:
        return key_chunk <= query_chunk or not self.causal

    def need(self, queries: int, keys: int) -> Compute | None:
        """The block of two shards without the outer chunks that the mask empties; None when it empties all."""
        pairs = [
            (i, j)
            for i, query_chunk in enumerate(self.chunks(queries))
            for j, key_chunk in enumerate(self.chunks(keys))
            if self.visible(query_chunk, key_chunk)
        ]
        if not pairs:
            return None
        rows, columns = {i for i, _ in pairs}, {j for _, j in pairs}
        return Compute(queries, Parts(min(rows), max(rows) + 1), keys, Parts(min(columns), max(columns) + 1))


@dataclass(frozen=True)
class Schedule:
    """The steps of every rank; all ranks have equally many."""

    direction: Direction
    problem: Problem
    ranks: tuple[tuple[Step, ...], ...]

    def messages(self) -> Iterator[tuple[int, int, Message]]:
        """``(step, sending rank, message)`` of all sends."""
        for rank, steps in enumerate(self.ranks):
            for index, step in enumerate(steps):
                yield from ((index, rank, message) for message in step.sends)

    @property
    def volume(self) -> int:
        """Chunks sent by all ranks together, whatever their kind."""
        return sum(len(message.parts) for _, _, message in self.messages())


@dataclass(frozen=True)
class Strategy:
    """A name and two builders of schedules. ``single`` strategies cannot split a sequence over ranks."""

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

    def __init__(self, problem: Problem, direction: Direction) -> None:
        self.problem = problem
        self.direction: Direction = direction
        self._ranks: list[list[_DraftStep]] = [[] for _ in range(problem.world_size)]

    def _step(self, rank: int, index: int) -> _DraftStep:
        for steps in self._ranks:
            while len(steps) <= index:
                steps.append(_DraftStep())
        return self._ranks[rank][index]

    def transfer(
        self, step: int, source: int, target: int, kind: Kind, owner: int, parts: Parts, merge: int | None = None
    ) -> None:
        """Send in ``step``; a sum is merged by ``target`` at the end of its step ``merge``."""
        self._step(source, step).sends.append(Message(kind, owner, parts, target))
        received = Message(kind, owner, parts, source)
        self._step(target, step).receives.append(received)
        if merge is not None:
            self._step(target, merge).merges.append(received)

    def compute(self, step: int, rank: int, block: Compute) -> None:
        self._step(rank, step).computes.append(block)

    def finish(self) -> Schedule:
        ranks = tuple(
            tuple(Step(tuple(s.receives), tuple(s.sends), tuple(s.computes), tuple(s.merges)) for s in steps)
            for steps in self._ranks
        )
        return Schedule(self.direction, self.problem, ranks)


class Stop(NamedTuple):
    """A rank that a travelling shard visits: what arrives there and what is computed there."""

    rank: int
    carried: Parts
    block: Compute | None


def journey(problem: Problem, owner: int, travels: Kind, shift: int) -> list[Stop]:
    """The way of one shard of inputs around the ring, ``shift`` ranks a hop, from home to the last rank that needs it.

    Each hop carries only the chunks that this stop or a later one needs.
    """
    size = problem.world_size
    stops: list[Stop] = []
    carried: Parts | None = None
    for hop in reversed(range(size)):
        rank = (owner + hop * shift) % size
        block = problem.need(owner, rank) if travels == "query" else problem.need(rank, owner)
        if block is not None:
            needed = block.query_parts if travels == "query" else block.key_parts
            carried = needed if carried is None else carried.union(needed)
        if carried is not None:
            stops.append(Stop(rank, carried, block))
    return stops[::-1]

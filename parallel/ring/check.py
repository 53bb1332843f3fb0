"""Proves a schedule right before any process starts, by running it on sets of chunk pairs instead of tensors.

What is shown for a schedule that passes: every send has one receive, in the same step and order; no rank waits for
ever; every tensor is at hand where it is used; every visible pair of a query chunk and a key chunk enters its owner's
sums exactly once; nothing is left behind on other ranks.
"""

from collections import Counter
from dataclasses import dataclass, field

from parallel.ring.schedule import INPUTS, SUMS, Compute, Kind, Message, Parts, Schedule

Pair = tuple[int, int]  # (query chunk, key chunk) of the whole sequence
Key = tuple[Kind, int]


class ScheduleError(Exception):
    """A schedule breaks a rule; the text says which, where."""


@dataclass
class _Rank:
    """One rank of the abstract run: which step it is in and at which point of it, and what it holds."""

    inputs: dict[Key, Parts]
    sums: dict[Key, Counter[Pair]] = field(default_factory=dict)
    incoming: dict[Key, Message] = field(default_factory=dict)
    step: int = 0
    posted: int = 0  # steps whose receives are posted; its sends follow once their inputs are here
    sent: int = 0  # steps whose sends are posted


def _mirror(message: Message, rank: int) -> Message:
    return Message(message.kind, message.owner, message.parts, rank)


def _check_matching(schedule: Schedule) -> None:
    """Between two ranks, the sends of a step are the receives of the same step on the other side, in that order."""
    size = schedule.problem.world_size
    lengths = {len(steps) for steps in schedule.ranks}
    if len(schedule.ranks) != size or len(lengths) != 1:
        raise ScheduleError(f"{size} ranks need equally many steps, found {[len(steps) for steps in schedule.ranks]}")
    for index in range(lengths.pop()):
        for source in range(size):
            for target in range(size):
                sent = [m for m in schedule.ranks[source][index].sends if m.peer == target]
                received = [m for m in schedule.ranks[target][index].receives if m.peer == source]
                if sent and source == target:
                    raise ScheduleError(f"step {index}: rank {source} sends to itself")
                if [_mirror(m, source) for m in sent] != received:
                    raise ScheduleError(f"step {index}: rank {source} sends {sent}, rank {target} receives {received}")


class _Simulation:
    """Lets every rank go on as far as it can, again and again, by the engine's rules of waiting."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.problem = schedule, schedule.problem
        own: tuple[Kind, ...] = INPUTS
        self.ranks = [
            _Rank({(kind, rank): self.problem.whole for kind in own}) for rank in range(self.problem.world_size)
        ]
        self.in_flight: dict[tuple[int, Message], Counter[Pair]] = {}  # sums by (receiving rank, message)

    def run(self) -> None:
        moved = True
        while moved:
            moved = False
            for rank in range(self.problem.world_size):
                while self._advance(rank):
                    moved = True
        stuck = [rank for rank, state in enumerate(self.ranks) if state.step < len(self.schedule.ranks[rank])]
        if stuck:
            where = ", ".join(f"rank {rank} in step {self.ranks[rank].step}" for rank in stuck)
            raise ScheduleError(f"wait cycle: {where}")

    def _arrived(self, peer: int, step: int) -> bool:
        """A message of ``step`` is here once its sender has posted it (receives are posted before)."""
        return self.ranks[peer].sent > step

    def _input_here(self, rank: int, key: Key) -> bool:
        state = self.ranks[rank]
        message = state.incoming.get(key)
        if message is None:
            return True
        step = self._step_of(rank, message)
        if not self._arrived(message.peer, step):
            return False
        state.inputs[key] = message.parts
        del state.incoming[key]
        return True

    def _step_of(self, rank: int, message: Message) -> int:
        """The step in which ``rank`` posts this receive, the latest one that it has come to."""
        for index in range(self.ranks[rank].posted - 1, -1, -1):
            if message in self.schedule.ranks[rank][index].receives:
                return index
        raise ScheduleError(f"rank {rank} waits for {message}, which it has not begun to receive")

    def _advance(self, rank: int) -> bool:
        """Take the next point of a rank's current step if nothing holds it up; whether it moved."""
        state = self.ranks[rank]
        if state.step == len(self.schedule.ranks[rank]):
            return False
        step = self.schedule.ranks[rank][state.step]
        if state.posted == state.step:
            before = self.schedule.ranks[rank][state.step - 1].sends if state.step > 0 else ()
            if any(self.ranks[m.peer].posted < state.step for m in before):
                return False  # a send ends when the other side has posted its receive
            state.posted += 1
            for message in step.receives:
                if message.kind in INPUTS:
                    state.incoming[message.kind, message.owner] = message
            return True
        if state.sent == state.step:
            if not all(self._input_here(rank, (m.kind, m.owner)) for m in step.sends if m.kind in INPUTS):
                return False
            for message in step.sends:
                self._send(rank, message)
            state.sent += 1
            return True
        queries: list[Key] = [("query", block.queries) for block in step.computes]
        keys: list[Key] = [("keys", block.keys) for block in step.computes]
        if not all(self._input_here(rank, key) for key in queries + keys):
            return False
        if not all(self._arrived(m.peer, self._step_of(rank, m)) for m in step.merges):
            return False
        for block in step.computes:
            self._compute(rank, block)
        for message in step.merges:
            self._merge(rank, message)
        state.step += 1
        return True

    def _require(self, rank: int, key: Key, parts: Parts, purpose: object) -> None:
        held = self.ranks[rank].inputs.get(key)
        if held is None or not held.covers(parts):
            raise ScheduleError(f"rank {rank} holds {held} of {key} but needs {parts} for {purpose}")

    def _send(self, rank: int, message: Message) -> None:
        if message.kind in INPUTS:
            self._require(rank, (message.kind, message.owner), message.parts, message)
            return
        total = self.ranks[rank].sums.pop((message.kind, message.owner), None)
        if total is None:
            raise ScheduleError(f"rank {rank} has no sum to send as {message}")
        index = 1 if message.kind == "dkeys" else 0
        chunks = self.problem.chunks(message.owner)[message.parts.start : message.parts.stop]
        if any(pair[index] not in chunks for pair in total):
            raise ScheduleError(f"rank {rank} sends {message}, which leaves out part of what it has summed")
        self.in_flight[message.peer, _mirror(message, rank)] = total

    def _merge(self, rank: int, message: Message) -> None:
        total = self.in_flight.pop((rank, message), None)
        if total is None:
            raise ScheduleError(f"rank {rank} merges {message} twice or without having received it")
        self.ranks[rank].sums.setdefault((message.kind, message.owner), Counter()).update(total)

    def _compute(self, rank: int, block: Compute) -> None:
        self._require(rank, ("query", block.queries), block.query_parts, block)
        self._require(rank, ("keys", block.keys), block.key_parts, block)
        queries = self.problem.chunks(block.queries)[slice(*block.query_parts)]
        keys = self.problem.chunks(block.keys)[slice(*block.key_parts)]
        pairs = Counter((q, k) for q in queries for k in keys if self.problem.visible(q, k))
        if not pairs:
            raise ScheduleError(f"rank {rank} computes {block}, of which nothing is visible")
        for kind in SUMS[self.schedule.direction]:
            owner = block.keys if kind == "dkeys" else block.queries
            self.ranks[rank].sums.setdefault((kind, owner), Counter()).update(pairs)

    def check_result(self) -> None:
        """Every rank ends with its own sums and no others, each visible pair in them once."""
        if self.in_flight:
            raise ScheduleError(f"sent but never merged: {list(self.in_flight)}")
        size = self.problem.world_size
        everything = [chunk for rank in range(size) for chunk in self.problem.chunks(rank)]
        for rank, state in enumerate(self.ranks):
            for kind in SUMS[self.schedule.direction]:
                own = self.problem.chunks(rank)
                queries, keys = (everything, own) if kind == "dkeys" else (own, everything)
                wanted = Counter((q, k) for q in queries for k in keys if self.problem.visible(q, k))
                found = state.sums.pop((kind, rank), Counter())
                if found != wanted:
                    raise ScheduleError(
                        f"rank {rank}, {kind}: missing {sorted((wanted - found).elements())}, "
                        f"too many {sorted((found - wanted).elements())}"
                    )
            if state.sums:
                raise ScheduleError(f"rank {rank} ends with sums of other ranks: {list(state.sums)}")


def check(schedule: Schedule) -> None:
    """Raise :class:`ScheduleError` unless the schedule computes its problem exactly and always ends."""
    _check_matching(schedule)
    simulation = _Simulation(schedule)
    simulation.run()
    simulation.check_result()


def link_traffic(schedule: Schedule) -> dict[tuple[int, int], Counter[Kind]]:
    """Chunks of each kind that each directed link ``(source, target)`` carries in one call."""
    traffic: dict[tuple[int, int], Counter[Kind]] = {}
    for _, rank, message in schedule.messages():
        traffic.setdefault((rank, message.peer), Counter())[message.kind] += len(message.parts)
    return traffic


def chunk_bytes(
    schedule: Schedule, *, batch: int, local_seq: int, heads: int, kv_heads: int, head_dim: int, element_bytes: int
) -> dict[Kind, int]:
    """Bytes of one chunk of each kind, as :mod:`parallel.ring.workers` sends them (sums and statistics in fp32)."""
    tokens = batch * (local_seq // len(schedule.problem.whole))
    query, keys = tokens * heads * head_dim, 2 * tokens * kv_heads * head_dim
    statistic = 4 * tokens * heads
    backward = schedule.direction == "backward"
    return {
        "query": query * element_bytes * (2 if backward else 1) + (2 * statistic if backward else 0),
        "keys": keys * element_bytes,
        "out": query * element_bytes + statistic,
        "dquery": 4 * query,
        "dkeys": 4 * keys,
    }

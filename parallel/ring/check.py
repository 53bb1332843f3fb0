"""Proves a schedule right before any process starts, by running it on counts of segment pairs instead of tensors.

What is shown for a schedule that passes: every send has one receive, in the same step and order; no rank waits for
ever; every tensor is at hand where it is used; every visible pair of a query segment and a key segment enters its
owner's sums exactly once for every head; nothing is left behind on other ranks.
"""

from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from parallel.ring.problem import Heads, Segments, Side
from parallel.ring.schedule import INPUTS, SUMS, Compute, Kind, Message, Schedule, exchange

Counts = NDArray[np.int64]  # [query segments, key segments, heads]: how often a pair has been added


class ScheduleError(Exception):
    """A schedule breaks a rule; the text says which, where."""


def side_of(kind: Kind) -> Side:
    """Whose segments a message of this kind is made of."""
    return "keys" if kind in ("keys", "dkeys") else "query"


@dataclass
class _Sum:
    """A sum for one owner and range of heads: which pairs are in it, by the segments of its owner."""

    counts: dict[int, Counts]  # [segments of the other side of all ranks, heads]

    def add(self, other: "_Sum") -> None:
        for segment, counts in other.counts.items():
            self.counts[segment] = self.counts[segment] + counts if segment in self.counts else counts


@dataclass
class _Rank:
    """One rank of the abstract run: which step it is in and at which point of it, and what it holds."""

    inputs: dict[tuple[Kind, int], list[tuple[Segments, Heads]]]
    sums: dict[tuple[Kind, int, Heads], _Sum] = field(default_factory=dict)
    incoming: list[tuple[int, Message]] = field(default_factory=list)  # inputs on their way, by the step of the receive
    awaited: set[Message] = field(default_factory=set)  # every input, and the sums that are not merged yet
    step: int = 0
    posted: int = 0  # exchanges whose receives are posted: a step's sums, then its inputs
    sent: int = 0  # exchanges whose sends are posted, once the inputs among them are here


def _check_matching(schedule: Schedule) -> None:
    """Between two ranks, the sends of a step are the receives of the same step on the other side, in that order."""
    size = schedule.problem.world_size
    lengths = {len(steps) for steps in schedule.ranks}
    if len(schedule.ranks) != size or len(lengths) != 1:
        raise ScheduleError(f"{size} ranks need equally many steps, found {[len(steps) for steps in schedule.ranks]}")
    for index in range(lengths.pop()):
        sent: dict[tuple[int, int], list[Message]] = {}
        received: dict[tuple[int, int], list[Message]] = {}
        for rank, steps in enumerate(schedule.ranks):
            for message in steps[index].sends:
                sent.setdefault((rank, message.peer), []).append(replace(message, peer=rank))
            for message in steps[index].receives:
                received.setdefault((message.peer, rank), []).append(message)
        for source, target in sorted(sent | received):
            if source == target:
                raise ScheduleError(f"step {index}: rank {source} sends to itself")
            out, back = sent.get((source, target), []), received.get((source, target), [])
            if out != back:
                raise ScheduleError(f"step {index}: rank {source} sends {out}, rank {target} receives {back}")


class _Simulation:
    """Lets every rank go on as far as it can, again and again, by the engine's rules of waiting."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.problem = schedule, schedule.problem
        self.ranks = [
            _Rank({(kind, rank): [(self.problem.whole(side_of(kind), rank), self.problem.heads)] for kind in INPUTS})
            for rank in range(self.problem.world_size)
        ]
        self.in_flight: dict[tuple[int, Message], list[_Sum]] = {}  # sums by (receiving rank, message)
        self.receive_steps: list[dict[Message, list[int]]] = []  # in which steps a rank receives a message
        for steps in schedule.ranks:
            found: dict[Message, list[int]] = {}
            for index, step in enumerate(steps):
                for message in step.receives:
                    found.setdefault(message, []).append(index)
            self.receive_steps.append(found)

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

    def _arrived(self, message: Message, step: int) -> bool:
        """A received message of ``step`` is here once its sender has posted it (receives are posted before)."""
        return self.ranks[message.peer].sent > exchange(step, message)

    def _left(self, rank: int, number: int) -> bool:
        """Whether the sends of an exchange have ended: they do when the other side has posted its receive."""
        sends = self.schedule.ranks[rank][number // 2].sends if number >= 0 else ()
        return all(self.ranks[m.peer].posted > number for m in sends if exchange(number // 2, m) == number)

    def _inputs_here(self, rank: int, kind: Kind, owner: int, segments: Segments) -> bool:
        """Whether what is on its way of these segments has come; if so it is taken in."""
        state = self.ranks[rank]
        for entry in list(state.incoming):
            step, message = entry
            if (message.kind, message.owner) == (kind, owner) and not set(segments).isdisjoint(message.segments):
                if not self._arrived(message, step):
                    return False
                state.inputs.setdefault((kind, owner), []).append((message.segments, message.heads))
                state.incoming.remove(entry)
        return True

    def _sum_here(self, rank: int, message: Message) -> bool:
        posted = self.ranks[rank].posted
        steps = [s for s in self.receive_steps[rank].get(message, []) if exchange(s, message) < posted]
        if not steps:
            raise ScheduleError(f"rank {rank} merges {message}, which it has not begun to receive")
        return self._arrived(message, steps[-1])

    def _advance(self, rank: int) -> bool:
        """Take the next point of a rank's current step if nothing holds it up; whether it moved."""
        state = self.ranks[rank]
        if state.step == len(self.schedule.ranks[rank]):
            return False
        step = self.schedule.ranks[rank][state.step]
        if state.sent < state.posted:
            sends = [m for m in step.sends if exchange(state.step, m) == state.sent]
            if not all(self._inputs_here(rank, m.kind, m.owner, m.segments) for m in sends if m.kind in INPUTS):
                return False
            for message in sends:
                self._send(rank, message)
            state.sent += 1
            return True
        if state.posted < 2 * state.step + 2:
            if not self._left(rank, state.posted - 2 * self.schedule.window):
                return False
            receives = [m for m in step.receives if exchange(state.step, m) == state.posted]
            state.posted += 1
            if not state.awaited.isdisjoint(receives) or len(set(receives)) < len(receives):
                raise ScheduleError(f"rank {rank}, step {state.step}: receives again what it waits for or has")
            state.awaited.update(receives)
            state.incoming += [(state.step, message) for message in receives if message.kind in INPUTS]
            return True
        for block in step.computes:
            if not self._inputs_here(rank, "query", block.queries, block.query_segments):
                return False
            if not self._inputs_here(rank, "keys", block.keys, block.key_segments):
                return False
        if not all(self._sum_here(rank, message) for message in step.merges):
            return False
        for block in step.computes:
            self._compute(rank, block)
        for message in step.merges:
            self._merge(rank, message)
        state.step += 1
        return True

    def _require(self, rank: int, kind: Kind, owner: int, segments: Segments, heads: Heads, purpose: object) -> None:
        held = self.ranks[rank].inputs.get((kind, owner), [])
        there = {segment for some, sliced in held if sliced.covers(heads) for segment in some}
        if not segments or not there.issuperset(segments):
            raise ScheduleError(f"rank {rank} holds {held} of {kind} {owner} but needs {segments} for {purpose}")

    def _send(self, rank: int, message: Message) -> None:
        if message.kind in INPUTS:
            self._require(rank, message.kind, message.owner, message.segments, message.heads, message)
            return
        key = (message.kind, message.owner, message.heads)
        total = self.ranks[rank].sums.get(key, _Sum({}))
        if not message.segments or not set(message.segments) <= set(total.counts):
            raise ScheduleError(f"rank {rank} has no such sum to send: {message}")
        leaving = _Sum({segment: total.counts.pop(segment) for segment in message.segments})
        self.in_flight.setdefault((message.peer, replace(message, peer=rank)), []).append(leaving)
        if not total.counts:
            del self.ranks[rank].sums[key]

    def _merge(self, rank: int, message: Message) -> None:
        waiting = self.in_flight.get((rank, message))
        if not waiting:
            raise ScheduleError(f"rank {rank} merges {message} twice or without having received it")
        self.ranks[rank].awaited.discard(message)
        key = (message.kind, message.owner, message.heads)
        self.ranks[rank].sums.setdefault(key, _Sum({})).add(waiting.pop(0))

    def _compute(self, rank: int, block: Compute) -> None:
        self._require(rank, "query", block.queries, block.query_segments, block.heads, block)
        self._require(rank, "keys", block.keys, block.key_segments, block.heads, block)
        problem = self.problem
        rows = [problem.span("query", block.queries).start + segment for segment in block.query_segments]
        columns = [problem.span("keys", block.keys).start + segment for segment in block.key_segments]
        seen = np.zeros(problem.pairs.shape, dtype=np.int64)
        seen[np.ix_(rows, columns)] = problem.seen[np.ix_(rows, columns)]
        if not (seen[rows].any(1).all() and seen[:, columns].any(0).all()):
            raise ScheduleError(f"rank {rank} computes {block}, of which some segment sees nothing")
        heads = np.zeros(len(problem.heads), dtype=np.int64)
        heads[block.heads.start - problem.heads.start : block.heads.stop - problem.heads.start] = 1
        for kind in SUMS[self.schedule.direction]:
            if kind == "dkeys":
                found = _Sum({s: np.outer(seen[:, c], heads) for s, c in zip(block.key_segments, columns, strict=True)})
            else:
                found = _Sum({s: np.outer(seen[r], heads) for s, r in zip(block.query_segments, rows, strict=True)})
            owner = block.keys if kind == "dkeys" else block.queries
            self.ranks[rank].sums.setdefault((kind, owner, block.heads), _Sum({})).add(found)

    def check_result(self) -> None:
        """Every rank ends with its own sums and no others, each visible pair in them once for every head."""
        lost = [message for message, sums in self.in_flight.items() if sums]
        if lost:
            raise ScheduleError(f"sent but never merged: {lost}")
        seen = self.problem.seen.astype(np.int64)
        for rank, state in enumerate(self.ranks):
            for kind in SUMS[self.schedule.direction]:
                total = _Sum({})
                for key in [key for key in state.sums if key[:2] == (kind, rank)]:
                    total.add(state.sums.pop(key))
                side = side_of(kind)
                first = self.problem.span(side, rank).start
                for segment in self.problem.whole(side, rank):
                    wanted = seen[:, first + segment] if side == "keys" else seen[first + segment]
                    found = total.counts.get(segment, np.zeros((len(wanted), len(self.problem.heads)), np.int64))
                    if (found != wanted[:, None]).any():
                        raise ScheduleError(
                            f"rank {rank}, {kind}, segment {segment}: missing (other segment, head) "
                            f"{np.argwhere(found < wanted[:, None]).tolist()}, "
                            f"too many {np.argwhere(found > wanted[:, None]).tolist()}"
                        )
            if state.sums:
                raise ScheduleError(f"rank {rank} ends with sums of other ranks: {list(state.sums)}")


def check(schedule: Schedule) -> None:
    """Raise :class:`ScheduleError` unless the schedule computes its problem exactly and always ends."""
    _check_matching(schedule)
    simulation = _Simulation(schedule)
    simulation.run()
    simulation.check_result()

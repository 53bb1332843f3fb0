"""A schedule as arrays: what every step of every rank sends, waits for, computes and holds, in bytes and FLOPs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from parallel.plan.topology import Floats, Ints
from parallel.ring.problem import Heads, Segments
from parallel.ring.schedule import INPUTS, Compute, Kind, Message, Schedule, exchange

SENT, COMPUTED, MERGED = 0, 1, 2  # at which point of a step a received message is waited for


@dataclass(frozen=True)
class Program:
    """Messages in the order of their exchanges; every array has one entry a message, or ``[steps, ranks]``."""

    ranks: int
    steps: int
    window: int  # see Schedule.window
    exchange: Ints  # in which a message is sent: twice its step, and one more for inputs
    source: Ints
    target: Ints
    size: Floats  # bytes
    tensors: Ints  # of which it is made
    needed: Ints  # the step in which the receiver waits for it
    point: Ints  # SENT, COMPUTED or MERGED: where in that step
    flops: Floats  # [steps, ranks]
    blocks: Ints  # [steps, ranks] calls of the block kernel
    held: Floats  # [steps, ranks] bytes that do not belong to the rank: arriving, in use, waiting to be sent


@dataclass(frozen=True)
class _Piece:
    """Some segments and heads of a shard at a point of a step: a use of an input, or the beginning of a sum."""

    step: int
    point: int
    segments: Segments
    heads: Heads

    def meets(self, message: Message) -> bool:
        """Whether the message brings some of it; inputs are waited for by segment, whatever the heads."""
        return not set(self.segments).isdisjoint(message.segments)


@dataclass
class _Uses:
    """Where one rank uses inputs, ascending, and in which step it merges the sums that arrive."""

    inputs: dict[tuple[Kind, int], list[_Piece]] = field(default_factory=dict)
    sums: dict[Message, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> "_Uses":
        uses = cls()
        for index, step in enumerate(schedule.ranks[rank]):
            for message in step.sends:
                if message.kind in INPUTS:
                    uses._add(message.kind, message.owner, _Piece(index, SENT, message.segments, message.heads))
            for block in step.computes:
                uses._add("query", block.queries, _Piece(index, COMPUTED, block.query_segments, block.heads))
                uses._add("keys", block.keys, _Piece(index, COMPUTED, block.key_segments, block.heads))
            for message in step.merges:
                uses.sums.setdefault(message, []).append(index)
        return uses

    def _add(self, kind: Kind, owner: int, piece: _Piece) -> None:
        self.inputs.setdefault((kind, owner), []).append(piece)

    def of_message(self, message: Message, step: int) -> tuple[int, int, int]:
        """``(step, point)`` where a message of ``step`` is waited for, and the last step that needs it."""
        if message.kind not in INPUTS:
            merged = next(index for index in self.sums[message] if index >= step)
            return merged, MERGED, merged
        found = [p for p in self.inputs[message.kind, message.owner] if p.step >= step and p.meets(message)]
        return found[0].step, found[0].point, found[-1].step


class _Held:
    """Bytes of others that one rank holds, step by step."""

    def __init__(self, rank: int, bytes_by_step: Floats) -> None:
        self._rank, self._bytes = rank, bytes_by_step
        self._sums: dict[tuple[Kind, int], list[_Piece]] = {}

    def arrive(self, message: Message, size: float, step: int, last: int) -> None:
        self._bytes[step : last + 1] += size
        if message.kind not in INPUTS:
            self._begin(message.kind, message.owner, _Piece(last, MERGED, message.segments, message.heads))

    def compute(self, block: Compute, step: int, backward: bool) -> None:
        queries = _Piece(step, COMPUTED, block.query_segments, block.heads)
        self._begin("dquery" if backward else "out", block.queries, queries)
        if backward:
            self._begin("dkeys", block.keys, _Piece(step, COMPUTED, block.key_segments, block.heads))

    def send(self, message: Message, size: float, step: int) -> None:
        """What was begun of a sum leaves."""
        pieces = self._sums.get((message.kind, message.owner), [])
        left = [piece for piece in pieces if piece.meets(message)]
        if left:
            self._bytes[min(piece.step for piece in left) : step + 1] += size
            pieces[:] = [piece for piece in pieces if piece not in left]

    def _begin(self, kind: Kind, owner: int, piece: _Piece) -> None:
        if owner != self._rank:
            self._sums.setdefault((kind, owner), []).append(piece)


def compile_schedule(
    schedule: Schedule,
    message_bytes: Callable[[Message], float],
    block_flops: Callable[[Compute], float],
    tensors: Mapping[Kind, int],
) -> Program:
    """Translate a schedule; ``message_bytes`` and ``block_flops`` say what its parts weigh, ``tensors`` of how many
    tensors its messages are."""
    ranks, steps = len(schedule.ranks), len(schedule.ranks[0])
    weight, work = lru_cache(maxsize=None)(message_bytes), lru_cache(maxsize=None)(block_flops)
    flops, held = np.zeros((steps, ranks)), np.zeros((steps, ranks))
    blocks = np.zeros((steps, ranks), np.int64)
    rows: list[tuple[int, int, int, float, int, int, int]] = []
    for rank in range(ranks):
        uses, holds = _Uses.of(schedule, rank), _Held(rank, held[:, rank])
        for index, step in enumerate(schedule.ranks[rank]):
            for message in step.sends:
                if message.kind not in INPUTS:
                    holds.send(message, weight(message), index)
            for block in step.computes:
                flops[index, rank] += work(block)
                blocks[index, rank] += 1
                holds.compute(block, index, schedule.direction == "backward")
            for message in step.receives:
                needed, point, last = uses.of_message(message, index)
                ends = exchange(index, message), message.peer, rank
                rows.append((*ends, weight(message), needed, point, tensors[message.kind]))
                holds.arrive(message, weight(message), index, last)
    rows.sort()
    columns = list(zip(*rows, strict=True)) if rows else [()] * 7
    number, source, target, needed, point, parts = (np.array(columns[i], np.int64) for i in (0, 1, 2, 4, 5, 6))
    size = np.array(columns[3], float)
    messages = number, source, target, size, parts, needed, point
    return Program(ranks, steps, schedule.window, *messages, flops, blocks, held)

"""How many bytes a schedule sends, over which links, and how few its problem allows."""

from collections import Counter
from dataclasses import dataclass

from parallel.ring.problem import Problem
from parallel.ring.schedule import Direction, Kind, Message, Schedule

# Of how many tensors a message is made, as :mod:`parallel.ring.workers` sends it.
TENSORS: dict[Direction, dict[Kind, int]] = {
    "forward": {"query": 1, "keys": 2, "out": 2},
    "backward": {"query": 4, "keys": 2, "dquery": 1, "dkeys": 2},
}


@dataclass(frozen=True)
class Widths:
    """What a token of one head weighs; statistics (lse, delta) and gradients travel in the dtype of accumulation."""

    batch: int
    head_dim: int
    value_dim: int
    element_bytes: int
    wide_bytes: int = 4


def message_bytes(problem: Problem, direction: Direction, message: Message, widths: Widths) -> int:
    """Bytes of a message, as :mod:`parallel.ring.workers` sends it."""
    w = widths
    if message.kind in ("keys", "dkeys"):
        tokens = problem.tokens("keys", message.owner, message.segments)
        heads, element = problem.key_heads(message.heads), w.element_bytes if message.kind == "keys" else w.wide_bytes
        return w.batch * tokens * len(heads) * (w.head_dim + w.value_dim) * element
    each = {
        "query": w.head_dim * w.element_bytes
        + (w.value_dim * w.element_bytes + 2 * w.wide_bytes if direction == "backward" else 0),
        "out": w.value_dim * (w.wide_bytes if message.wide else w.element_bytes) + w.wide_bytes,
        "dquery": w.head_dim * w.wide_bytes,
    }
    tokens = problem.tokens("query", message.owner, message.segments)
    return w.batch * tokens * len(message.heads) * each[message.kind]


def link_bytes(schedule: Schedule, widths: Widths) -> Counter[tuple[int, int]]:
    """Bytes that each directed link ``(source, target)`` carries in one call."""
    total: Counter[tuple[int, int]] = Counter()
    for _, rank, message in schedule.messages():
        total[rank, message.peer] += message_bytes(schedule.problem, schedule.direction, message, widths)
    return total


def needed_keys(problem: Problem) -> int:
    """Tokens of keys that ranks see but do not own, summed over ranks: no strategy that moves keys sends fewer."""
    total = 0
    for rank in range(problem.world_size):
        for owner in range(problem.world_size):
            need = problem.need(rank, owner)
            if owner != rank and need is not None:
                total += problem.tokens("keys", owner, need.key_segments)
    return total

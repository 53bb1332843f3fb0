"""Ring attention (arXiv 2310.01889): queries stay, keys and values visit every rank, one hop a step.

In the backward pass the gradient of the keys and values follows them one step behind. Its owner's own share never
leaves home, and the last visitor sends the rest straight there, so it is sent once less than around the whole ring.
"""

from functools import lru_cache

from parallel.ring.schedule import Direction, Draft, Parts, Problem, Schedule, Strategy, journey


def _build(problem: Problem, direction: Direction, shift: int) -> Schedule:
    draft = Draft(problem, direction)
    for owner in range(problem.world_size):
        stops = journey(problem, owner, "keys", shift)
        gathered: Parts | None = None  # chunks whose gradient is on its way
        for hop, stop in enumerate(stops):
            if stop.block is not None:
                draft.compute(hop, stop.rank, stop.block)
            if hop + 1 < len(stops):
                following = stops[hop + 1]
                draft.transfer(hop, stop.rank, following.rank, "keys", owner, following.carried)
            if direction == "forward" or hop == 0:
                continue
            if stop.block is not None:
                keys = stop.block.key_parts
                gathered = keys if gathered is None else gathered.union(keys)
            if gathered is not None:
                target = stops[hop + 1].rank if hop + 1 < len(stops) else owner
                draft.transfer(hop + 1, stop.rank, target, "dkeys", owner, gathered, merge=hop + 1)
    return draft.finish()


def _cheaper(problem: Problem, direction: Direction) -> Schedule:
    """Of the two ways around the ring, the one that carries fewer chunks: under a causal mask the first ranks' keys
    are needed most widely, so it matters which part of the way a shard can be trimmed on."""
    return min((_build(problem, direction, shift) for shift in (1, -1)), key=lambda schedule: schedule.volume)


@lru_cache
def forward(problem: Problem) -> Schedule:
    return _cheaper(problem, "forward")


@lru_cache
def backward(problem: Problem) -> Schedule:
    return _cheaper(problem, "backward")


STRATEGY = Strategy("ring", forward, backward)

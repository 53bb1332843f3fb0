"""Schedules are proved right without a process; the checker rejects every way of breaking one."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from parallel.attention import STRATEGIES
from parallel.ring import ring, token_ring
from parallel.ring.check import ScheduleError, check, chunk_bytes, link_traffic
from parallel.ring.engine import last_uses
from parallel.ring.schedule import INPUTS, Parts, Problem, Schedule, Step

FIELDS = ("receives", "sends", "computes", "merges")


def _problems(sizes: range) -> Iterator[Problem]:
    for layout in ("contiguous", "zigzag"):
        for causal in (True, False):
            for world_size in sizes:
                yield Problem(world_size, layout, causal)


def _schedules(problem: Problem) -> Iterator[Schedule]:
    for strategy in STRATEGIES.values():
        if not strategy.single or problem.world_size == 1:
            yield strategy.forward(problem)
            yield strategy.backward(problem)


@pytest.mark.parametrize("problem", _problems(range(1, 9)), ids=str)
def test_every_shipped_schedule_is_right(problem: Problem) -> None:
    for schedule in _schedules(problem):
        check(schedule)


def _with_step(schedule: Schedule, rank: int, index: int, step: Step) -> Schedule:
    steps = list(schedule.ranks[rank])
    steps[index] = step
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(steps)
    return replace(schedule, ranks=tuple(ranks))


def _mutants(schedule: Schedule) -> Iterator[tuple[str, Schedule]]:
    """Leave out, double, or move to the next step each single thing that a schedule says."""
    for rank, steps in enumerate(schedule.ranks):
        for index, step in enumerate(steps):
            for field in FIELDS:
                items: tuple[Any, ...] = getattr(step, field)
                for i, item in enumerate(items):
                    where = f"rank {rank}, step {index}, {field}: {item}"
                    without = replace(step, **{field: items[:i] + items[i + 1 :]})
                    yield f"without {where}", _with_step(schedule, rank, index, without)
                    yield f"twice {where}", _with_step(schedule, rank, index, replace(step, **{field: (*items, item)}))
                    if field in ("receives", "sends") and index + 1 < len(steps):
                        later = replace(steps[index + 1], **{field: (*getattr(steps[index + 1], field), item)})
                        moved = _with_step(schedule, rank, index, without)
                        yield f"late {where}", _with_step(moved, rank, index + 1, later)


def _is_rejected(schedule: Schedule) -> bool:
    try:
        check(schedule)
    except ScheduleError:
        return True
    return False


@pytest.mark.parametrize("problem", _problems(range(2, 4)), ids=str)
def test_every_broken_schedule_is_rejected(problem: Problem) -> None:
    for schedule in _schedules(problem):
        for what, mutant in _mutants(schedule):
            assert _is_rejected(mutant), f"accepted: {what}"


def test_a_trimmed_message_is_rejected_at_both_ends() -> None:
    schedule = token_ring.forward(Problem(2, "zigzag", False))
    step = schedule.ranks[0][0]
    half = Parts(0, 1)
    sent = replace(step, sends=(replace(step.sends[0], parts=half),))
    other = schedule.ranks[1][0]
    received = replace(other, receives=(replace(other.receives[0], parts=half),))
    mutant = _with_step(_with_step(schedule, 0, 0, sent), 1, 0, received)
    with pytest.raises(ScheduleError, match="holds"):
        check(mutant)


def test_a_circle_of_waits_is_found() -> None:
    """Every rank is to send on, in one step, what its neighbour sends it in that very step."""
    schedule = ring.forward(Problem(3, "contiguous", False))
    ranks: list[tuple[Step, ...]] = []
    for first, second, *rest in schedule.ranks:
        both = replace(first, receives=first.receives + second.receives, sends=first.sends + second.sends)
        ranks.append((both, replace(second, receives=(), sends=()), *rest))
    with pytest.raises(ScheduleError, match="wait cycle: rank 0 in step 0, rank 1 in step 0, rank 2 in step 0"):
        check(replace(schedule, ranks=tuple(ranks)))


@pytest.mark.parametrize("problem", _problems(range(2, 9)), ids=str)
def test_inputs_in_memory_do_not_grow_with_the_ranks(problem: Problem) -> None:
    """Of other ranks' inputs, a rank has the one of the current block and the one arriving for the next."""
    for schedule in _schedules(problem):
        for rank, steps in enumerate(schedule.ranks):
            alive: set[object] = set()
            for step, dead in zip(steps, last_uses(schedule, rank), strict=True):
                alive |= {(m.kind, m.owner) for m in step.receives if m.kind in INPUTS}
                assert len(alive) <= 2
                alive -= dead
            assert not alive


def test_the_mask_saves_traffic() -> None:
    """Contiguous: keys go to later ranks only. Zigzag: all ranks send alike, less than without a mask."""
    size = 4
    traffic = link_traffic(ring.forward(Problem(size, "contiguous", True)))
    assert {link: dict(kinds) for link, kinds in traffic.items()} == {(r, r + 1): {"keys": r + 1} for r in range(3)}
    assert ring.forward(Problem(size, "zigzag", True)).volume == 18
    assert ring.forward(Problem(size, "zigzag", False)).volume == 24


def test_bytes_are_those_of_the_published_formulas() -> None:
    """(N-1)(Q + O + L) forward and (N-1)(Q + dO + 2L + dQ) backward for TokenRing, (N-1) KV and (N-1)(KV + dKV) for
    the ring, per rank."""
    shape: dict[str, int] = {"batch": 2, "local_seq": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "element_bytes": 2}
    query, lse, keys = 2 * 16 * 4 * 8, 4 * 2 * 16 * 4, 2 * 2 * 16 * 2 * 8
    expected = {
        ("token_ring", "forward"): 2 * query + 2 * query + lse,
        ("token_ring", "backward"): 2 * query + 2 * query + 2 * lse + 4 * query,
        ("ring", "forward"): 2 * keys,
        ("ring", "backward"): 2 * keys + 4 * keys,
    }
    for world_size in (2, 3, 5):
        for (name, direction), per_hop in expected.items():
            schedule: Schedule = getattr(STRATEGIES[name], direction)(Problem(world_size, "contiguous", False))
            sizes = chunk_bytes(schedule, **shape)
            sent = [0] * world_size
            for (source, _), kinds in link_traffic(schedule).items():
                sent[source] += sum(sizes[kind] * chunks for kind, chunks in kinds.items())
            assert sent == [(world_size - 1) * per_hop] * world_size, (name, direction)

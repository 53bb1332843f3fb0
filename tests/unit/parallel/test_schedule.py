"""Schedules are proved right without a process; the checker rejects every way of breaking one."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from conf.errors import ConfigError
from fused.mask import CAUSAL, FULL, Mask
from parallel.layout import balanced, contiguous, named_layout
from parallel.ring.check import ScheduleError, check
from parallel.ring.engine import last_uses
from parallel.ring.heads import slices
from parallel.ring.problem import Heads, Problem
from parallel.ring.scene import Scene
from parallel.ring.schedule import INPUTS, Schedule, Step
from parallel.ring.traffic import Widths, link_bytes, message_bytes, needed_keys
from parallel.strategies import STRATEGIES, find_strategy
from tests.helpers.attention import Case, run_in_memory

FIELDS = ("receives", "sends", "computes", "merges")
RING_LIKE = ("ring", "bidirectional_ring", "token_ring", "bidirectional_query")


@cache
def _problem(
    ranks: int, layout: str, mask: Mask, documents: int = 0, queries: int | None = None, heads: tuple[int, int] = (4, 2)
) -> Problem:
    tokens = 8 * ranks
    ids = None
    if documents:
        ids = np.sort(np.random.default_rng(ranks).integers(0, documents, (1, tokens)), 1)
    keys = named_layout(layout, tokens, ranks)
    moved = keys if queries is None else named_layout(layout, queries, ranks).shifted(tokens - queries)
    return Scene(moved, keys, mask, *heads, ids).problem


def _problems(ranks: int) -> Iterator[Problem]:
    for layout in ("contiguous", "zigzag"):
        yield _problem(ranks, layout, FULL)
        yield _problem(ranks, layout, CAUSAL)
        yield _problem(ranks, layout, CAUSAL, documents=2 * ranks)
    yield _problem(ranks, "contiguous", Mask(left=11, right=0))
    yield _problem(ranks, "zigzag", CAUSAL, queries=2 * ranks, heads=(4, 1))


def _schedules(problem: Problem) -> Iterator[tuple[str, Schedule]]:
    size = problem.world_size
    parametric = [f"tile:{a}" for a in (2, 4) if size % a == 0]
    parametric += [f"hybrid:2:{inner}" for inner in ("token_ring", "tile") if size % 2 == 0]
    for name in (*STRATEGIES, *parametric):
        strategy = find_strategy(name)
        if not strategy.single or size == 1:
            yield name, strategy.forward(problem)
            yield name, strategy.backward(problem)


@pytest.mark.parametrize("ranks", range(1, 17))
def test_every_shipped_schedule_is_right(ranks: int) -> None:
    thinned = slice(None) if ranks <= 8 else slice(ranks % 4, None, 4)
    for problem in list(_problems(ranks))[thinned]:
        for name, schedule in _schedules(problem):
            try:
                check(schedule)
            except ScheduleError as error:
                raise AssertionError(f"{name}, {schedule.direction}, {problem}") from error


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


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_every_broken_schedule_is_rejected(ranks: int) -> None:
    count = 0
    problems = [_problem(ranks, "zigzag", CAUSAL), _problem(ranks, "contiguous", FULL)]
    for problem in problems if ranks < 4 else problems[:1]:
        for name, schedule in _schedules(problem):
            mutants = list(_mutants(schedule))
            for what, mutant in mutants if ranks < 3 else mutants[::5]:
                assert _is_rejected(mutant), f"accepted: {name}, {what}"
                count += 1
    assert count > 300


def _both_ends(schedule: Schedule, **changes: Any) -> Schedule:
    """Change the first message of rank 0 where it is sent and where it is received."""
    step = schedule.ranks[0][0]
    message = step.sends[0]
    sent = replace(step, sends=(replace(message, **changes), *step.sends[1:]))
    there = schedule.ranks[message.peer][0]
    index = next(i for i, m in enumerate(there.receives) if m.peer == 0)
    receives = list(there.receives)
    receives[index] = replace(receives[index], **changes)
    mutant = _with_step(schedule, 0, 0, sent)
    return _with_step(mutant, message.peer, 0, replace(mutant.ranks[message.peer][0], receives=tuple(receives)))


@pytest.mark.parametrize("changes", [{"segments": (0,)}, {"heads": Heads(0, 2)}])
def test_a_trimmed_message_is_rejected_at_both_ends(changes: dict[str, Any]) -> None:
    for name in ("token_ring", "ring", "tile", "allgather"):
        schedule = find_strategy(name).forward(_problem(2, "zigzag", FULL))
        check(_both_ends(schedule))
        with pytest.raises(ScheduleError, match="holds"):
            check(_both_ends(schedule, **changes))


def test_a_circle_of_waits_is_found() -> None:
    """Every rank is to send on, in one step, what its neighbour sends it in that very step."""
    schedule = find_strategy("ring").forward(_problem(3, "contiguous", FULL))
    ranks: list[tuple[Step, ...]] = []
    for first, second, *rest in schedule.ranks:
        both = replace(first, receives=first.receives + second.receives, sends=first.sends + second.sends)
        ranks.append((both, replace(second, receives=(), sends=()), *rest))
    with pytest.raises(ScheduleError, match="wait cycle: rank 0 in step 0, rank 1 in step 0, rank 2 in step 0"):
        check(replace(schedule, ranks=tuple(ranks)))


@pytest.mark.parametrize("ranks", range(2, 9))
def test_inputs_in_memory_do_not_grow_with_the_ranks(ranks: int) -> None:
    """Of other ranks' inputs, a rank has the shard of the current block and the one arriving for the next."""
    for mask, layout in ((FULL, "contiguous"), (CAUSAL, "zigzag")):
        problem = _problem(ranks, layout, mask)
        for name in RING_LIKE:
            for schedule in (find_strategy(name).forward(problem), find_strategy(name).backward(problem)):
                for rank, steps in enumerate(schedule.ranks):
                    alive = 0
                    for step, dead in zip(steps, last_uses(schedule, rank), strict=True):
                        alive += sum(_tokens(problem, m) for m in step.receives if m.kind in INPUTS)
                        assert alive <= 2 * 8, (name, rank)
                        alive -= sum(_tokens(problem, m) for m in dead)
                    assert alive == 0


def _tokens(problem: Problem, message: Any) -> int:
    side = "keys" if message.kind in ("keys", "dkeys") else "query"
    return problem.tokens(side, message.owner, message.segments)


def _sent(schedule: Schedule, widths: Widths) -> list[int]:
    sent = [0] * schedule.problem.world_size
    for (source, _), count in link_bytes(schedule, widths).items():
        sent[source] += count
    return sent


def test_bytes_are_those_of_the_published_formulas() -> None:
    """Per rank: (N-1)(Q + O + L) forward and (N-1)(Q + dO + 2L + dQ) backward for TokenRing, (N-1) KV and
    (N-1)(KV + dKV) for the ring, (a-1)(Q + O + L) + (b-1) KV for the tile, (N-1)/N (Q + KV + O) for Ulysses."""
    query, lse, keys = 2 * 8 * 4 * 8, 4 * 2 * 8 * 4, 2 * 2 * 8 * 2 * 8  # elements of a shard, bytes of its lse
    widths = Widths(batch=2, head_dim=8, value_dim=8, element_bytes=2)
    passed_query = {"forward": 2 * 2 * query + lse, "backward": 2 * 2 * query + 2 * lse + 4 * query}
    passed_keys = {"forward": 2 * keys, "backward": 6 * keys}
    for size in (2, 4):
        problem = _problem(size, "contiguous", FULL)
        for direction in ("forward", "backward"):
            wide = 2 * query if direction == "forward" else 0  # running results travel in fp32
            rest = passed_query[direction], passed_keys[direction]
            expected = {
                "token_ring": (size - 1) * rest[0],
                "bidirectional_query": (size - 1) * (rest[0] + wide),
                "ring": (size - 1) * rest[1],
                "bidirectional_ring": (size - 1) * rest[1],
                "allgather": (size - 1) * rest[1],
                "allgather_query": (size - 1) * rest[0],
                "tile:2": rest[0] + (size // 2 - 1) * rest[1],
            }
            if size == 2:
                expected["ulysses"] = (rest[0] + rest[1]) // 2
            for name, per_rank in expected.items():
                schedule: Schedule = getattr(find_strategy(name), direction)(problem)
                assert _sent(schedule, widths) == [per_rank] * size, (name, direction)


@pytest.mark.parametrize("name", [*RING_LIKE, "tile", "ulysses", "hybrid:2:ring", "allgather", "allgather_query"])
def test_the_engine_sends_the_bytes_that_are_counted(name: str) -> None:
    case = Case(name, 4, keys=8 * 4, head_dim=6, value_dim=10, dtype=torch.bfloat16, batch=2)
    problem = _problem(4, "zigzag", CAUSAL)
    widths = Widths(batch=2, head_dim=6, value_dim=10, element_bytes=2)
    strategy = find_strategy(name)
    counted = link_bytes(strategy.forward(problem), widths) + link_bytes(strategy.backward(problem), widths)
    assert {link: count for link, count in run_in_memory(case)[1].items() if count} == dict(counted)


def test_opposite_directions_carry_the_same() -> None:
    """Neighbour links only, and half of a one-way ring's bytes on each."""
    widths = Widths(batch=1, head_dim=8, value_dim=8, element_bytes=4)
    problem = _problem(4, "contiguous", FULL)
    one_way = link_bytes(find_strategy("ring").forward(problem), widths)
    for name in ("bidirectional_ring", "bidirectional_query"):
        both = link_bytes(find_strategy(name).forward(problem), widths)
        assert {(b - a) % 4 for a, b in both} == {1, 3}
        assert len(set(both.values())) == 1
    halves = link_bytes(find_strategy("bidirectional_ring").forward(problem), widths)
    assert 2 * max(halves.values()) == max(one_way.values())


def test_a_mask_saves_work_and_traffic() -> None:
    """Causal and contiguous: keys go to later ranks only. A narrow window: to the next rank only."""
    schedule = find_strategy("ring").forward(_problem(4, "contiguous", CAUSAL))
    assert {(rank, m.peer) for _, rank, m in schedule.messages()} == {(0, 1), (1, 2), (2, 3)}
    for name in ("ring", "allgather", "token_ring"):
        schedule = find_strategy(name).forward(_problem(4, "contiguous", Mask(left=3, right=0)))
        inputs = [m for _, _, m in schedule.messages() if m.kind in INPUTS]
        assert {abs(rank - m.peer) for _, rank, m in schedule.messages()} == {1}
        assert len(inputs) == 3
        assert sum(len(step.computes) for steps in schedule.ranks for step in steps) <= 4 * 2 + 3


def test_packed_documents_are_balanced_and_send_only_what_is_needed() -> None:
    """64 documents of random length on 8 ranks."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(16, 512, 64)
        ids = np.repeat(np.arange(64), lengths)[None]
        layout = balanced(torch.from_numpy(ids), 8)
        scene = Scene(layout, layout, CAUSAL, 4, 2, ids)
        problem, widths = scene.problem, Widths(1, 8, 8, 2)
        work = [problem.pairs[problem.span("query", rank)].sum() for rank in range(8)]
        assert max(work) <= 1.05 * np.mean(work)
        bound = needed_keys(problem) * 2 * (8 + 8) * 2
        for name in ("ring", "bidirectional_ring", "allgather"):
            schedule = find_strategy(name).forward(problem)
            check(schedule)
            sent = sum(message_bytes(problem, "forward", m, widths) for _, _, m in schedule.messages())
            assert sent <= 1.1 * bound
        for name in ("token_ring", "bidirectional_query", "tile", "ulysses", "allgather_query"):
            check(find_strategy(name).backward(problem))


@pytest.mark.parametrize("key_heads", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("group", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 16])
def test_heads_are_split_for_any_number_of_ranks(key_heads: int, group: int, count: int) -> None:
    found = slices(Heads(0, key_heads * group), group, count)
    assert len(found) == count
    assert [head for part in found for head in range(*part)] == list(range(key_heads * group))
    for part in found:
        aligned = part.start % group == 0 and part.stop % group == 0
        assert aligned or part.start // group == (part.stop - 1) // group
    sizes = [len(part) for part in found]
    assert max(sizes) <= group * -(-key_heads // count)


def test_equal_problems_share_a_schedule() -> None:
    first, second = (Scene(contiguous(12, 3), contiguous(12, 3), CAUSAL, 4, 2).problem for _ in range(2))
    assert first is not second
    assert find_strategy("ring").forward(first) is find_strategy("ring").forward(second)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenring", "did you mean token_ring"),
        ("tile:two", "a number of ranks after the colon"),
        ("ring:2", "tile takes a row"),
        ("hybrid:2:local", "hybrid a group and a strategy"),
        ("ring/tile:", "a number of ranks after the colon"),
    ],
)
def test_wrong_names_are_explained(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_strategy(name)

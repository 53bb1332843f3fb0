"""The cost model: programs, topologies and replays against what can be worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest

from conf.errors import ConfigError
from fused.mask import CAUSAL, FULL
from parallel.layout import named_layout
from parallel.plan.choose import DIRECTIONS, explain, plan
from parallel.plan.cost import predict, weigh
from parallel.plan.program import Program
from parallel.plan.replay import Machine, link_loads, replay
from parallel.plan.topology import Speed, Topology
from parallel.ring.problem import Problem
from parallel.ring.scene import plain_scene
from parallel.ring.traffic import Widths, link_bytes
from parallel.strategies import STRATEGIES, find_strategy

WIDTHS = Widths(batch=1, head_dim=8, value_dim=8, element_bytes=4)
QUERY = 64 * 4 * 8 * 4  # bytes of one shard's queries: 64 tokens, 4 heads of 8, fp32; keys and values are twice that
OUT = QUERY + 64 * 4 * 4
FAST = Machine(flops=1e18)


def problem(ranks: int, causal: bool = False, layout: str = "contiguous", kv_heads: int = 4) -> Problem:
    held = named_layout(layout, 64 * ranks, ranks)
    return plain_scene(held, held, CAUSAL if causal else FULL, 4, kv_heads).problem


def program(
    name: str, ranks: int, direction: str = "forward", causal: bool = False, layout: str = "contiguous"
) -> Program:
    return weigh(getattr(find_strategy(name), direction)(problem(ranks, causal, layout)), WIDTHS)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


@pytest.mark.parametrize(
    ("kind", "size", "source", "target", "names"),
    [
        ("port", 4, 0, 3, ["out 0", "in 3"]),
        ("mesh", 4, 1, 3, ["1 > 3"]),
        ("ring", 5, 0, 2, ["0 > 1", "1 > 2"]),
        ("ring", 5, 0, 3, ["0 > 4", "4 > 3"]),
        ("ring", 4, 3, 1, ["3 > 0", "0 > 1"]),
        ("ring", 2, 1, 0, ["1 > 0"]),
    ],
)
def test_a_message_takes_the_links_of_its_way(kind, size, source, target, names):
    topology = Topology(kind, size, Speed(1.0))
    path = topology.paths(ints(source), ints(target))[0]
    assert [topology.name(link) for link in path if link != len(topology.bandwidth) - 1] == names


def test_islands_use_their_own_switch_inside_and_the_fabric_between():
    topology = Topology("two_level", 4, Speed(10.0, 1.0), island=2, fabric=Speed(2.0, 5.0))
    inside, between = topology.paths(ints(0, 1), ints(1, 2))
    assert [topology.name(x) for x in inside] == ["out 0", "in 1"]
    assert [topology.name(x) for x in between] == ["fabric out 1", "fabric in 2"]
    assert topology.bandwidth[inside].tolist() == [10.0, 10.0]
    assert topology.bandwidth[between].tolist() == [2.0, 2.0]
    assert topology.latency(ints(0, 1), ints(1, 2)).tolist() == [1.0, 5.0]


def test_wrong_topologies_are_refused():
    with pytest.raises(ConfigError, match="mesh"):
        Topology("mash", 4, Speed(1.0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="islands of equal size"):
        Topology("two_level", 4, Speed(1.0), island=3, fabric=Speed(1.0))
    with pytest.raises(ConfigError, match="bandwidth above 0"):
        Topology("port", 4, Speed(0.0))


def test_ring_moves_keys_once_around_on_every_topology():
    ranks, keys = 4, 2 * QUERY
    for kind in ("port", "ring", "mesh"):
        topology = Topology(kind, ranks, Speed(float(QUERY), 0.5))
        run = replay(program("ring", ranks), topology, FAST)
        assert run.link_bytes.max() == (ranks - 1) * keys
        # Each hop takes two seconds and half a second of latency; nothing else costs time.
        assert run.seconds == pytest.approx(3 * 2.5)
        assert run.exposed == pytest.approx(run.seconds)


def test_compute_hides_what_is_shorter():
    ranks = 4
    work = program("ring", ranks)
    block = work.flops.sum(0)[0] / ranks
    topology = Topology("ring", ranks, Speed(2.0 * QUERY))  # a hop of keys takes a second
    slow = replay(work, topology, Machine(flops=block / 3))  # a block takes three
    assert slow.seconds == pytest.approx(4 * 3)
    assert slow.exposed == pytest.approx(0)
    calls = int(work.blocks.sum(0)[0])
    overhead = replay(work, topology, Machine(flops=block / 3, block=0.5))
    assert overhead.seconds == pytest.approx(4 * 3 + 0.5 * calls)


def test_all_links_of_a_rank_together_carry_what_it_can_send():
    """A mesh whose ranks fill one link and a half: three messages at once take twice as long as one."""
    work = program("allgather", 4)
    free, bound = (Topology("mesh", 4, Speed(2.0 * QUERY), injection=most) for most in (np.inf, 3.0 * QUERY))
    assert replay(work, free, FAST).seconds == pytest.approx(1)
    assert replay(work, bound, FAST).seconds == pytest.approx(2)
    assert len(link_loads(work, free)) == 16
    prediction, _ = predict(work, bound, FAST)
    assert prediction.busiest_link == "all out 0"
    assert [bound.name(link) for link in bound.paths(ints(1), ints(3))[0]] == ["1 > 3", "all out 1", "all in 3"]


def test_messages_that_share_a_port_at_once_take_longer_than_their_bytes():
    crowded = Topology("port", 4, Speed(2.0 * QUERY), crowding=1.25)
    assert replay(program("allgather", 4), crowded, FAST).seconds == pytest.approx(3 * 1.25)
    assert replay(program("ring", 4), crowded, FAST).seconds == pytest.approx(3)


def test_posting_takes_time_for_every_tensor():
    """A hop of the ring is keys and values, one each way: two receives and two sends; so is a call's agreement."""
    work, topology = program("ring", 4), Topology("ring", 4, Speed(2.0 * QUERY), post=0.25)
    assert replay(work, topology, FAST).seconds == pytest.approx(3 * (1 + 4 * 0.25))
    assert replay(work, topology, Machine(1e18, call=0.5)).seconds == pytest.approx(0.5 + 3 * 2)


def test_a_core_that_also_moves_messages_computes_later():
    """A rank of the ring takes part in an exchange of each of the first three steps: a shard of keys out, one in."""
    work, topology = program("ring", 4), Topology("ring", 4, Speed(2.0 * QUERY))
    block = work.flops.sum(0)[0] / 4
    slow, keys = Machine(flops=block / 3), work.size[0]
    plain = replay(work, topology, slow)
    busy = replay(work, replace(topology, turn=0.25, copy=0.125 / keys), slow)
    assert plain.seconds == pytest.approx(4 * 3)
    assert busy.seconds == pytest.approx(4 * 3 + 3 * (0.25 + 2 * 0.125))
    assert busy.compute_seconds == plain.compute_seconds  # what messages take is exposed communication


def test_token_ring_returns_cross_many_links_of_a_ring_but_one_of_a_mesh():
    ring = link_loads(program("token_ring", 8), Topology("ring", 8, Speed(1.0)))
    mesh = link_loads(program("token_ring", 8), Topology("mesh", 8, Speed(1.0)))
    assert mesh.sum() == 8 * 7 * (QUERY + OUT)
    # Way home of the partial results: 1, 2, 3, 4, 3, 2 and 1 links.
    assert ring.sum() == 8 * (7 * QUERY + 16 * OUT)


def test_causal_work_is_balanced_by_zigzag():
    zigzag, contiguous = (program("ring", 4, causal=True, layout=name) for name in ("zigzag", "contiguous"))
    assert zigzag.flops.sum() == contiguous.flops.sum() == 256 * 257 / 2 * 4 * 2 * 16
    assert zigzag.flops.sum(axis=0).max() == pytest.approx(zigzag.flops.sum(axis=0).min())
    assert contiguous.flops.sum(axis=0).max() > 1.5 * contiguous.flops.sum(axis=0).mean()


@pytest.mark.parametrize("name", ["ring", "token_ring"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_memory_in_flight_does_not_grow_with_the_ranks(name, direction):
    few, many = (program(name, ranks, direction).held.max() for ranks in (5, 12))
    assert many == few > 0


def test_a_prediction_names_the_busiest_link():
    prediction, run = predict(program("ring", 4), Topology("port", 4, Speed(1e6)), FAST)
    assert prediction.busiest_link == "out 0"
    assert prediction.busiest_bytes == run.link_bytes.max()
    assert prediction.total_bytes == 4 * 3 * 2 * QUERY


def test_one_rank_sends_nothing():
    prediction, _ = predict(program("ring", 1), Topology("port", 1, Speed(1e6)), Machine(flops=1e6))
    assert prediction.busiest_link == "none"
    assert prediction.seconds == prediction.compute > 0


@pytest.mark.parametrize("name", [name for name, strategy in STRATEGIES.items() if not strategy.single])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_bytes_are_those_of_the_schedule(name, direction):
    schedule = getattr(find_strategy(name), direction)(problem(4, causal=True, layout="zigzag"))
    mesh = link_loads(weigh(schedule, WIDTHS), Topology("mesh", 4, Speed(1.0))).reshape(4, 4)
    counted = link_bytes(schedule, WIDTHS)
    assert {(i, j): mesh[i, j] for i, j in np.argwhere(mesh).tolist()} == dict(counted)


def test_units_scale_bytes_once_and_work_twice():
    schedule = find_strategy("token_ring").backward(problem(4))
    one, ten = weigh(schedule, WIDTHS), weigh(schedule, WIDTHS, unit=10)
    assert ten.size.sum() == pytest.approx(10 * one.size.sum())
    assert ten.flops.sum() == pytest.approx(100 * one.flops.sum())


def compared(kv_heads: int, kind: str = "port", memory: float = float("inf"), flops: float = 1e18):
    strategies = [find_strategy(name) for name in ("local", "ring", "token_ring", "bidirectional_ring", "tile:2")]
    topology = Topology(kind, 4, Speed(1e6))  # pyright: ignore[reportArgumentType]
    return plan(
        strategies, problem(4, kv_heads=kv_heads), WIDTHS, topology, dict.fromkeys(DIRECTIONS, Machine(flops)), memory
    )


def test_the_planner_follows_the_bytes():
    assert compared(4, "port").forward == "tile:2"
    assert compared(1, "ring").forward == "bidirectional_ring"  # one key head: keys are a quarter of the queries
    assert compared(1, "port").backward == "ring"  # both rings are equal there; the plain one holds no more


def test_hidden_communication_leaves_the_choice_to_memory():
    chosen = compared(1, "ring", flops=1.0)
    fast = [c for c in chosen.of("forward") if c.prediction is not None]
    held = {c.strategy: c.prediction.memory for c in fast if c.prediction is not None}
    assert held[chosen.forward] == min(held.values())
    assert all("hidden" in candidate.reason for candidate in fast)


def test_the_planner_says_why_not():
    chosen = compared(4, memory=8.0 * QUERY)
    refused = {c.strategy: c.reason for c in chosen.of("backward") if c.prediction is None}
    assert set(refused) == {"local", "ring", "bidirectional_ring"}
    assert "whole sequence" in refused["local"]
    assert "the limit is" in refused["ring"]
    text = explain(chosen, {"links": "port"})
    assert text.startswith("links")
    assert f"* {chosen.forward}" in text
    assert "cannot run: keeps a whole sequence" in text
    with pytest.raises(ConfigError, match="one strategy that can run"):
        compared(4, memory=1.0)


def test_results_leave_before_the_next_inputs_are_here():
    """Four ranks on a mesh: three hops of queries, and each result on a link of its own while the next hop travels."""
    mesh = Topology("mesh", 4, Speed(float(QUERY)))
    assert replay(program("token_ring", 4), mesh, FAST).seconds == pytest.approx(1 + 3 * OUT / QUERY)
    bundle = 2 * OUT / QUERY  # queries, gradients of the output, lse and delta
    assert replay(program("token_ring", 4, "backward"), mesh, FAST).seconds == pytest.approx(3 * bundle + 1)


@pytest.mark.parametrize("ranks", [4, 8])
def test_fetching_at_once_uses_all_links_of_a_mesh(ranks):
    mesh = Topology("mesh", ranks, Speed(float(QUERY)))
    assert replay(program("allgather", ranks), mesh, FAST).seconds == pytest.approx(2)
    assert replay(program("allgather", ranks, "backward"), mesh, FAST).seconds == pytest.approx(4)
    bundle = 2 * OUT / QUERY
    assert replay(program("allgather_query", ranks), mesh, FAST).seconds == pytest.approx(1 + OUT / QUERY)
    assert replay(program("allgather_query", ranks, "backward"), mesh, FAST).seconds == pytest.approx(bundle + 1)


def test_a_link_carries_one_exchange_after_another():
    """Through one port each way everything takes as long as its bytes, in whatever order it was posted."""
    port = Topology("port", 4, Speed(float(QUERY)))
    assert replay(program("allgather", 4, "backward"), port, FAST).seconds == pytest.approx(3 * 4)


def test_exchanges_over_different_links_share_what_a_rank_can_send():
    """Queries and results leave over links of their own: a limit above two links at once delays nothing, one link's
    worth makes them take turns."""
    free, wide, narrow = (
        Topology("mesh", 4, Speed(float(QUERY)), injection=most) for most in (np.inf, 2.5 * QUERY, 1.0 * QUERY)
    )
    work = program("token_ring", 4)
    assert replay(work, wide, FAST).seconds == pytest.approx(replay(work, free, FAST).seconds)
    assert replay(work, narrow, FAST).seconds == pytest.approx(3 + 3 * OUT / QUERY)


def test_a_sender_goes_on_when_its_buffer_has_taken_the_message():
    """Rows, then columns, over links of their own: the second exchange of inputs need not wait for the first to arrive.
    A ring's hops wait for what they pass on, whatever buffers hold."""
    work, ring = program("tile:2", 4, "backward"), program("ring", 4)
    seconds = [
        replay(work, Topology("mesh", 4, Speed(float(QUERY)), buffer=held), FAST).seconds for held in (0, QUERY, 1e9)
    ]
    assert seconds[0] > seconds[1] > seconds[2]
    for held in (0.0, 1e9):
        assert replay(ring, Topology("ring", 4, Speed(float(QUERY)), buffer=held), FAST).seconds == pytest.approx(6)

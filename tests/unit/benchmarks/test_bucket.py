"""The token bucket that stands in for links where they cannot be shaped; time is a number here."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.bucket import Bucket, Pace
from parallel.plan.topology import Speed, Topology
from parallel.ring.channel import Arrival, Parcels


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Instant:
    """A channel that delivers at once."""

    early = True

    def receive(self, peer: int, tensors: Sequence[torch.Tensor]) -> list[Arrival]:
        class Here:
            def wait(self) -> torch.Tensor:
                return tensors[0]

        return [Here() for _ in tensors]

    def send(self, parcels: Parcels) -> None:
        pass

    def finish_sends(self, keep: int = 0) -> None:
        pass


def bucket(file: Path, clock: Clock, kind: str = "ring", latency: float = 0.0) -> Bucket:
    topology = Topology(kind, 4, Speed(10.0, latency))  # pyright: ignore[reportArgumentType]
    return Bucket(file, topology, lambda: clock.now, clock.sleep)


def test_messages_on_one_link_follow_each_other(tmp_path):
    links = bucket(tmp_path / "b", Clock())
    assert links.reserve(0, 1, 50, 0) == 105.0
    assert links.reserve(0, 1, 20, 1) == 107.0
    assert links.reserve(1, 0, 20, 0) == 102.0  # the other way is another link
    assert links.reserve(2, 3, 20, 0) == 102.0
    assert links.arrival(0, 1, 0) == 105.0
    assert links.arrival(0, 1, 1) == 107.0


def test_a_long_way_takes_all_of_its_links(tmp_path):
    links = bucket(tmp_path / "b", Clock())
    assert links.reserve(0, 2, 10, 0) == 101.0
    assert links.reserve(1, 2, 10, 0) == 102.0


def test_ports_are_shared_by_all_targets(tmp_path):
    links = bucket(tmp_path / "b", Clock(), "port", latency=0.5)
    assert links.reserve(0, 1, 10, 0) == 101.5
    assert links.reserve(0, 2, 10, 0) == 102.5
    assert links.reserve(3, 2, 10, 0) == 103.5  # the way into rank 2 was taken until 102


def test_two_processes_share_one_table(tmp_path):
    clock = Clock()
    one, two = (bucket(tmp_path / "b", clock) for _ in range(2))
    one.reserve(0, 1, 50, 0)
    assert two.arrival(0, 1, 0) == 105.0
    assert two.reserve(0, 1, 10, 1) == 106.0


@pytest.mark.parametrize("size", [4, 40])
def test_both_ends_wait_for_the_link(tmp_path, size):
    clock = Clock()
    links = bucket(tmp_path / "b", clock)
    sender, receiver = Pace(links, 0).channel(Instant()), Pace(links, 1).channel(Instant())
    tensor = torch.zeros(size, dtype=torch.uint8)
    (arrival,) = receiver.receive(0, [tensor])
    sender.send([(1, tensor)])
    assert clock.now == 100.0
    arrival.wait()
    assert clock.now == pytest.approx(100 + size / 10)
    sender.finish_sends()
    assert clock.now == pytest.approx(100 + size / 10)


def test_lots_leave_in_their_order(tmp_path):
    clock = Clock()
    sender = Pace(bucket(tmp_path / "b", clock), 0).channel(Instant())
    for size in (10, 20):
        sender.send([(1, torch.zeros(size, dtype=torch.uint8))])
    sender.finish_sends(keep=1)
    assert clock.now == pytest.approx(101)
    sender.finish_sends()
    assert clock.now == pytest.approx(103)

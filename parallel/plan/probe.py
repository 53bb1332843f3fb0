"""Measures what the planner needs to know: the links between ranks, and how fast a rank computes a block.

All ranks call the functions together and get the same answer. The links are told apart by what slows them down: a rank
that sends both ways at once takes longer where both share a port; a message to the second neighbour takes longer where
it crosses the links of others. Hosts are islands where several ranks share one.
"""

import socket
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fused.block import block_backward, block_forward
from fused.mask import FULL, BlockMask
from parallel.agreement import check_agreement
from parallel.plan.replay import Machine, Machines
from parallel.plan.topology import Kind, Speed, Topology
from parallel.ring.channel import Arrival, GroupChannel

SHARED = 1.5  # a pattern that takes this much longer than a plain shift shares links
PROBE_BYTES = 1 << 18
PROBE_SECONDS = 0.2  # a transfer should take about this long to be measured well
MAX_BYTES = 1 << 26
REPEATS, SHORT_REPEATS = 3, 15
# Products of a square matrix beside messages: its size, how long in all, beside how many exchanges of next to nothing.
BUSY_SIZE, BUSY_SECONDS, TURNS = 256, 0.1, 32
TIMEOUT_SEC = 60.0


def _agreed(value: float, group: dist.ProcessGroup, device: torch.device) -> float:
    """The slowest rank's figure, on all ranks."""
    found = torch.tensor([value], dtype=torch.float64, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
    return float(found.item())


def _nothing() -> None:
    pass


def _timed(
    run: Callable[[], None], group: dist.ProcessGroup, device: torch.device, after: Callable[[], None] = _nothing
) -> float:
    """Median seconds of runs that all ranks begin together, by the slowest rank; ``after`` is not timed.

    A few runs, and more of short ones, which one rank that waits for a core decides.
    """
    seconds: list[float] = []
    while len(seconds) < REPEATS or (len(seconds) < SHORT_REPEATS and sum(seconds) < PROBE_SECONDS):
        dist.barrier(group)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken = time.perf_counter() - start
        after()
        seconds.append(_agreed(taken, group, device))
    return statistics.median(seconds)


class _Wires:
    """Shifts of messages over the ranks."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)

    def shift(self, size: int, *distances: int, sending: bool = False) -> float:
        """Seconds in which every rank sends ``size`` bytes to the ranks at all these distances; only until it is rid of
        them, if ``sending``."""
        payload = torch.zeros(size, dtype=torch.uint8, device=self._device)
        rooms = [torch.empty_like(payload) for _ in distances]
        channel = GroupChannel(self._group, self._device, TIMEOUT_SEC)
        arrivals: list[Arrival] = []

        def arrive() -> None:
            while arrivals:
                arrivals.pop(0).wait()

        def run() -> None:
            for distance, room in zip(distances, rooms, strict=True):
                arrivals.extend(channel.receive((self._rank - distance) % self._size, [room]))
            channel.send([((self._rank + distance) % self._size, payload) for distance in distances])
            if not sending:
                arrive()
            channel.finish_sends()

        return _timed(run, self._group, self._device, arrive)

    def buffer(self, size: int, speed: Speed) -> float:
        """Bytes of a message of ``size`` that its sender is rid of before they have travelled: buffers of sockets."""
        if self._device.type != "cpu":
            return 0.0  # on a stream nobody waits for sends
        travelling = self.shift(size, 1) - self.shift(size, 1, sending=True)
        return min(max(0.0, travelling) * speed.bandwidth, float(size))

    def post(self) -> float:
        """Seconds of a rank's host for a tensor that it sends or receives: what eight more of each take."""
        return max(0.0, self.shift(1, *[1] * 9) - self.shift(1, 1)) / 16

    def together(self, size: int, distances: Sequence[int], latency: float) -> float:
        """Bytes/s that a rank sends to several others at once, and receives from as many."""
        return len(distances) * size / max(self.shift(size, *distances) - latency, 1e-9)

    def busy(self, speed: Speed) -> tuple[float, float]:
        """Seconds that a rank's computing loses by an exchange with its neighbours, and by a byte of it, while all
        ranks compute; next to nothing where other cores, or a GPU's copy engines, move the messages."""
        square = torch.ones(BUSY_SIZE, BUSY_SIZE, device=self._device)
        target, source = (self._rank + 1) % self._size, (self._rank - 1) % self._size
        channel = GroupChannel(self._group, self._device, TIMEOUT_SEC)

        def compute(times: int, size: int | None = None, exchanges: int = 1) -> float:
            payload, room = (torch.zeros(size or 0, dtype=torch.uint8, device=self._device) for _ in range(2))

            def run() -> None:
                for _ in range(exchanges):
                    arrivals = channel.receive(source, [room]) if size else []
                    if size:
                        channel.send([(target, payload)])
                    for _ in range(times):
                        torch.mm(square, square)
                    for arrival in arrivals:
                        arrival.wait()
                    channel.finish_sends()

            return _timed(run, self._group, self._device)

        times = 8 * BUSY_SECONDS / compute(8)
        few, many = (int(min(max(1.0, times * share), 1 << 20)) for share in (1 / TURNS, 1.0))
        turn = max(0.0, compute(few, 1, TURNS) - compute(few, None, TURNS)) / TURNS
        size = int(min(max(1.0, 0.5 * BUSY_SECONDS * speed.bandwidth), MAX_BYTES))
        return turn, max(0.0, compute(many, size) - compute(many) - turn) / (2 * size)

    def speed(self, distance: int, post: float) -> tuple[Speed, int]:
        """Of one message to ``distance`` at a time, and a size that takes long enough to compare patterns with."""
        latency = self.shift(1, distance)
        seconds = max(self.shift(PROBE_BYTES, distance) - latency, 1e-9)
        size = int(min(max(PROBE_BYTES, PROBE_BYTES * PROBE_SECONDS / seconds), MAX_BYTES))
        seconds = max(self.shift(size, distance) - latency, 1e-9)
        return Speed(size / seconds, max(0.0, latency - 2 * post)), size


def _island(group: dist.ProcessGroup) -> int:
    """Ranks of one host where every host has equally many in a row, else 0."""
    hosts: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(hosts, socket.gethostname(), group=group)
    size = hosts.index(next((host for host in hosts if host != hosts[0]), hosts[0]))
    even = size > 1 and len(hosts) % size == 0
    regular = even and all(len(set(hosts[i : i + size])) == 1 for i in range(0, len(hosts), size))
    return size if regular and len(set(hosts)) == len(hosts) // size else 0


def measure_links(group: dist.ProcessGroup, device: torch.device, kind: Kind | None = None) -> Topology:
    """The links of a group by a few timed exchanges; ``kind`` where it is known. Collective."""
    wires, size = _Wires(group, device), dist.get_world_size(group)
    island, post = _island(group), wires.post()
    if (kind is None and island) or kind == "two_level":
        inside, _ = wires.speed(1, post)  # the slowest neighbours are on different hosts
        between, _ = wires.speed(island or 1, post)
        within = _inside(group, device, island) if island else inside
        turn, copy = wires.busy(inside)
        return Topology("two_level", size, within, island or 1, between, post=post, turn=turn, copy=copy)
    speed, probe = wires.speed(1, post)
    if kind is None:
        alone = wires.shift(probe, 1)
        if size < 3 or wires.shift(probe, 1, -1) > SHARED * alone:
            kind = "port"  # with two ranks there is one link only, and all kinds are the same
        else:
            # The second neighbour's message passes a link that carries another; with four ranks it is the antipode.
            kind = "ring" if size > 3 and wires.shift(probe, 2) > SHARED * alone else "mesh"
    turn, copy = wires.busy(speed)
    found = Topology(kind, size, speed, post=post, buffer=wires.buffer(probe, speed), turn=turn, copy=copy)
    if size < 3:
        return found
    neighbours = (1, -1) if kind == "ring" else range(1, size)
    together = wires.together(probe, neighbours, speed.latency)
    if kind == "port":
        return replace(found, crowding=max(1.0, speed.bandwidth / together))
    return replace(found, injection=together)


def _inside(group: dist.ProcessGroup, device: torch.device, island: int) -> Speed:
    """Speed between neighbours of one island while all islands do the same."""
    rank = dist.get_rank(group)
    first = rank - rank % island
    payload, room = (torch.zeros(PROBE_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
    channel = GroupChannel(group, device, TIMEOUT_SEC)

    def run(size: int) -> None:
        arrivals = channel.receive(first + (rank - first - 1) % island, [room[:size]])
        channel.send([(first + (rank - first + 1) % island, payload[:size])])
        arrivals[0].wait()
        channel.finish_sends()

    latency = _timed(lambda: run(1), group, device)
    seconds = max(_timed(lambda: run(PROBE_BYTES), group, device) - latency, 1e-9)
    return Speed(PROBE_BYTES / seconds, latency)


def _block_seconds(like: tuple[Tensor, ...], tokens: int, backward: bool, group: dist.ProcessGroup) -> float:
    """Of a block of ``tokens``, its queries and keys shaped ``like`` these ``[1, 1, heads, head_dim]`` besides."""
    q, k = (x.new_empty(1, tokens, *x.shape[2:]).normal_() for x in like)
    positions = np.arange(tokens)
    mask = BlockMask.of(FULL.ranges(positions, tokens), positions, positions)
    out, lse = block_forward(q, k, k, mask, q.shape[3] ** -0.5)
    delta = torch.linalg.vecdot(out, out)

    def run() -> None:
        if backward:
            block_backward(q, k, k, out.to(q.dtype), lse, delta, mask, q.shape[3] ** -0.5)
        else:
            block_forward(q, k, k, mask, q.shape[3] ** -0.5)

    run()
    return _timed(run, group, q.device)


def measure_blocks(
    tokens: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, group: dist.ProcessGroup
) -> Machines:
    """Speed of block attention on ``tokens`` queries and keys, all ranks at work at once. Collective.

    ``shape``: heads, key heads, head_dim.
    """
    heads, kv_heads, head_dim = shape
    like = tuple(torch.empty(1, 1, h, head_dim, dtype=dtype, device=device) for h in (heads, kv_heads))

    def agree() -> None:
        check_agreement(group, device, (("probe", "links"), ("and", "blocks")), TIMEOUT_SEC)

    calls = {False: _timed(agree, group, device) if device.type == "cpu" else 0.0, True: 0.0}

    def machine(products: int, backward: bool) -> Machine:
        call = calls[backward]
        sizes = max(1, tokens // 8), tokens
        few, many = (_block_seconds(like, n, backward, group) for n in sizes)
        if many - few < 0.5 * many:  # the block is too small to tell its work from its call: a larger one beside it
            sizes = tokens, 4 * tokens
            few, many = many, _block_seconds(like, sizes[1], backward, group)
        flops = 2 * products * heads * head_dim
        if many - few < 0.5 * many:
            return Machine(flops * sizes[1] ** 2 / many, call=call)
        rate = flops * (sizes[1] ** 2 - sizes[0] ** 2) / (many - few)
        return Machine(rate, max(0.0, few - flops * sizes[0] ** 2 / rate), call)

    return {"forward": machine(2, False), "backward": machine(5, True)}

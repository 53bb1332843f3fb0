"""Replays a program on a topology: when every rank ends every step, and what the links carry.

The rules are the engine's: an exchange of a step, of sums and then of inputs, begins when what was sent in the one
before of its sort has left; a rank posts its receives, waits for inputs that it passes on, sends, waits for the inputs
of its blocks, computes, and waits for the sums that it merges. Messages of one exchange that share a link share its
bandwidth, so each takes as long as the fullest link on its way needs for all of them; a transfer begins when both ends
have posted it, which takes each its time, and its links have carried what earlier exchanges gave them. What limits all
links of a rank together holds no message up as long as there is room: exchanges over different links share it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from parallel.plan.program import COMPUTED, MERGED, SENT, Program
from parallel.plan.topology import Floats, Ints, Topology
from parallel.ring.schedule import Direction


@dataclass(frozen=True)
class Machine:
    """How fast a rank computes, all ranks at work at once."""

    flops: float  # FLOP/s of block attention
    block: float = 0.0  # seconds of a block's call besides
    call: float = 0.0  # seconds before the first exchange of a call, in which ranks see that they make the same one


Machines = Mapping[Direction, Machine]  # a backward block has other products than a forward one, and another rate


@dataclass(frozen=True)
class Replay:
    """Seconds by step and rank, and bytes by link."""

    computing: Floats  # [steps, ranks] inputs at hand
    computed: Floats  # [steps, ranks]
    arrival: Floats  # [messages]
    begin: Floats  # [messages]
    link_bytes: Floats  # [links] in all
    seconds: float  # until the last rank has finished
    compute_seconds: float  # of the rank that computes longest

    @property
    def exposed(self) -> float:
        """Seconds of communication that no computing hides."""
        return self.seconds - self.compute_seconds


def link_loads(program: Program, topology: Topology) -> Floats:
    """Bytes of each directed link over all steps, the padding's left out."""
    return _loads(program.size, topology.paths(program.source, program.target), len(topology.bandwidth))[:-1]


def _loads(size: Floats, paths: Ints, links: int) -> Floats:
    return np.bincount(paths.ravel(), np.repeat(size, paths.shape[1]), links).astype(np.float64)


class _Links:
    """When each link has carried what exchanges gave it so far."""

    def __init__(self, topology: Topology) -> None:
        self._topology, self._count = topology, len(topology.bandwidth)
        self._free = np.zeros(self._count)
        self._limits = np.zeros(self._count, dtype=bool)  # of all links of a rank together; several exchanges at once
        self._limits[topology.links : -1] = True

    def carry(self, ready: Floats, size: Floats, paths: Ints) -> tuple[Floats, Floats]:
        """When messages of one exchange, posted at ``ready``, begin, and when the links have carried them."""
        if not len(size):
            return ready, ready
        start = np.maximum(ready, np.where(self._limits, 0.0, self._free)[paths].max(axis=1))
        crowded = np.where(np.bincount(paths.ravel(), minlength=self._count) > 1, self._topology.crowding, 1.0)
        needs = _loads(size, paths, self._count) * crowded / self._topology.bandwidth
        first = np.full(self._count, np.inf)
        np.minimum.at(first, paths, start[:, None])
        full = np.where(self._limits & np.isfinite(first), np.maximum(self._free, first) + needs, 0.0)
        end = np.maximum(start + needs[paths].max(axis=1), full[paths].max(axis=1))
        last = np.zeros(self._count)
        np.maximum.at(last, paths, end[:, None])
        self._free = np.maximum(self._free, np.where(self._limits, full, last))
        self._free[-1] = 0.0
        return start, end


def _moving(program: Program, topology: Topology) -> Floats:
    """[steps, ranks] seconds that each rank's computing loses by the messages of its exchanges."""
    taken = np.zeros((program.steps, program.ranks))
    for ranks in (program.source, program.target):
        np.add.at(taken, (program.exchange // 2, ranks), program.size * topology.copy)
    both = [program.exchange * program.ranks + ranks for ranks in (program.source, program.target)]
    exchanges = np.unique(np.concatenate(both))  # of one rank each
    np.add.at(taken, (exchanges // program.ranks // 2, exchanges % program.ranks), topology.turn)
    return taken


def replay(program: Program, topology: Topology, machine: Machine) -> Replay:
    """Follow all ranks step by step."""
    shape = (program.steps, program.ranks)
    computing, computed = np.zeros(shape), np.zeros(shape)
    arrival, begin = np.zeros(len(program.size)), np.zeros(len(program.size))
    # For each point of each step the arrivals that it waits for, filled in as messages are sent.
    awaited = np.zeros((3, *shape))
    before = 2 * program.window
    left = np.zeros((2 * program.steps + before, program.ranks))  # when what a rank sent in an exchange has left
    carriers = _Links(topology)
    clock = np.full(program.ranks, machine.call)
    compute = program.flops / machine.flops + program.blocks * machine.block
    busy = compute + _moving(program, topology)
    paths = topology.paths(program.source, program.target)
    latency = topology.latency(program.source, program.target)
    bounds = np.searchsorted(program.exchange, np.arange(2 * program.steps + 1))
    for index in range(program.steps):
        for number in (2 * index, 2 * index + 1):
            here = slice(bounds[number], bounds[number + 1])
            source, target, links = program.source[here], program.target[here], paths[here]
            posting = [
                np.bincount(end, program.tensors[here], program.ranks) * topology.post for end in (target, source)
            ]
            posted = clock = np.maximum(clock, left[number]) + posting[0]
            if number % 2:
                clock = np.maximum(clock, awaited[SENT, index])
            clock = clock + posting[1]
            ready = np.maximum(clock[source], posted[target])
            start, carried = carriers.carry(ready, program.size[here], links)
            end = carried + latency[here]
            begin[here], arrival[here] = start, end
            np.maximum.at(awaited, (program.point[here], program.needed[here], target), end)
            in_sight = np.clip(1.0 - topology.buffer / program.size[here], 0.0, 1.0)
            np.maximum.at(left[number + before], source, ready + in_sight * (end - ready))
        computing[index] = np.maximum(clock, awaited[COMPUTED, index])
        computed[index] = computing[index] + busy[index]
        clock = np.maximum(computed[index], awaited[MERGED, index])
    loads = _loads(program.size, paths, len(topology.bandwidth))[:-1]
    seconds = float(max(clock.max(), left.max()))
    longest = float(compute.sum(axis=0).max())
    return Replay(computing, computed, arrival, begin, loads, seconds, longest)

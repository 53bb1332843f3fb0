"""Replays a program on a topology: when every rank ends every step, and what the links carry.

The rules are the engine's: an exchange of a step, of sums and then of inputs, begins when what was sent in the one
before of its sort has left; a rank posts its receives, waits for inputs that it passes on, sends, waits for the inputs
of its blocks, computes, and waits for the sums that it merges. Messages of one exchange that share a link share its
bandwidth, so each takes as long as the fullest link on its way needs for all of them; a transfer begins when both ends
have posted it, which takes each its time, and its links have carried what earlier exchanges gave them.
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


def _transfer(size: Floats, paths: Ints, topology: Topology) -> Floats:
    """Seconds of each message among the others of its exchange."""
    count = len(topology.bandwidth)
    crowded = np.where(np.bincount(paths.ravel(), minlength=count) > 1, topology.crowding, 1.0)
    return (_loads(size, paths, count) * crowded / topology.bandwidth)[paths].max(axis=1)


def replay(program: Program, topology: Topology, machine: Machine) -> Replay:
    """Follow all ranks step by step."""
    shape = (program.steps, program.ranks)
    computing, computed = np.zeros(shape), np.zeros(shape)
    arrival, begin = np.zeros(len(program.size)), np.zeros(len(program.size))
    # For each point of each step the arrivals that it waits for, filled in as messages are sent.
    awaited = np.zeros((3, *shape))
    before = 2 * program.window
    left = np.zeros((2 * program.steps + before, program.ranks))  # when what a rank sent in an exchange has left
    free = np.zeros(len(topology.bandwidth))  # when a link has carried what earlier exchanges gave it
    clock = np.full(program.ranks, machine.call)
    compute = program.flops / machine.flops + program.blocks * machine.block
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
            start = np.maximum(np.maximum(clock[source], posted[target]), free[links].max(axis=1, initial=0.0))
            end = start + latency[here] + _transfer(program.size[here], links, topology)
            begin[here], arrival[here] = start, end
            np.maximum.at(awaited, (program.point[here], program.needed[here], target), end)
            np.maximum.at(left[number + before], source, end)
            np.maximum.at(free, links, (end - latency[here])[:, None])
            free[-1] = 0.0
        computing[index] = np.maximum(clock, awaited[COMPUTED, index])
        computed[index] = computing[index] + compute[index]
        clock = np.maximum(computed[index], awaited[MERGED, index])
    loads = _loads(program.size, paths, len(topology.bandwidth))[:-1]
    seconds = float(max(clock.max(), left.max()))
    longest = float(compute.sum(axis=0).max())
    return Replay(computing, computed, arrival, begin, loads, seconds, longest)

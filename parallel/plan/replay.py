"""Replays a program on a topology: when every rank ends every step, and what the links carry.

The rules are the engine's: a rank starts a step when what it sent in the step before has left, posts its receives,
waits for inputs that it passes on, sends, waits for the inputs of its blocks, computes, and waits for the sums that it
merges. Messages of one step that share a link share its bandwidth, so each takes as long as the fullest link on its
way needs for all of them; a transfer begins when both ends have posted it.
"""

from dataclasses import dataclass

import numpy as np

from parallel.plan.program import COMPUTED, MERGED, SENT, Program
from parallel.plan.topology import Floats, Ints, Topology


@dataclass(frozen=True)
class Machine:
    """How fast a rank computes, all ranks at work at once."""

    flops: float  # FLOP/s of block attention
    block: float = 0.0  # seconds of a block's call besides


@dataclass(frozen=True)
class Replay:
    """Seconds by step and rank, and bytes by link."""

    start: Floats  # [steps, ranks] receives posted
    sent: Floats  # [steps, ranks] sends posted
    computing: Floats  # [steps, ranks] inputs at hand
    computed: Floats  # [steps, ranks]
    end: Floats  # [steps, ranks] received sums merged
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


def _transfer(size: Floats, paths: Ints, bandwidth: Floats) -> Floats:
    """Seconds of each message among the others of its step."""
    return (_loads(size, paths, len(bandwidth)) / bandwidth)[paths].max(axis=1)


def replay(program: Program, topology: Topology, machine: Machine) -> Replay:
    """Follow all ranks step by step."""
    shape = (program.steps, program.ranks)
    start, sent, computing, computed, end = (np.zeros(shape) for _ in range(5))
    arrival, begin = np.zeros(len(program.size)), np.zeros(len(program.size))
    # For each point of each step the arrivals that it waits for, filled in as messages are sent.
    awaited = np.zeros((3, *shape))
    left = np.zeros(program.ranks)  # when what a rank sent last has left
    clock = np.zeros(program.ranks)
    compute = program.flops / machine.flops + program.blocks * machine.block
    paths = topology.paths(program.source, program.target)
    latency = topology.latency(program.source, program.target)
    bounds = np.searchsorted(program.step, np.arange(program.steps + 1))
    for index in range(program.steps):
        here = slice(bounds[index], bounds[index + 1])
        source, target = program.source[here], program.target[here]
        start[index] = np.maximum(clock, left)
        sent[index] = np.maximum(start[index], awaited[SENT, index])
        begin[here] = np.maximum(sent[index, source], start[index, target])
        arrival[here] = begin[here] + latency[here] + _transfer(program.size[here], paths[here], topology.bandwidth)
        np.maximum.at(awaited, (program.point[here], program.needed[here], target), arrival[here])
        left = np.zeros(program.ranks)
        np.maximum.at(left, source, arrival[here])
        computing[index] = np.maximum(sent[index], awaited[COMPUTED, index])
        computed[index] = computing[index] + compute[index]
        end[index] = clock = np.maximum(computed[index], awaited[MERGED, index])
    loads = _loads(program.size, paths, len(topology.bandwidth))[:-1]
    seconds = float(np.maximum(clock, left).max())
    longest = float(compute.sum(axis=0).max())
    return Replay(start, sent, computing, computed, end, arrival, begin, loads, seconds, longest)

"""What a strategy costs: bytes, FLOPs and memory from its schedule, time from a replay on the links."""

from dataclasses import dataclass

import numpy as np

from parallel.plan.program import Program, compile_schedule
from parallel.plan.replay import Machine, Replay, replay
from parallel.plan.topology import Topology
from parallel.ring.schedule import Compute, Message, Schedule
from parallel.ring.traffic import TENSORS, Widths, message_bytes


def weigh(schedule: Schedule, widths: Widths, unit: float = 1.0) -> Program:
    """The schedule in bytes and FLOPs for tensors of these widths.

    ``unit``: tokens that one token of the problem stands for; long sequences are planned at a shorter length.
    """
    problem, direction = schedule.problem, schedule.direction
    d, dv = widths.head_dim, widths.value_dim
    # Two matrix products forward, of scores and of values; five backward, the scores once more among them.
    pair_flops = 2 * (d + dv if direction == "forward" else 3 * d + 2 * dv) * unit**2

    def size(message: Message) -> float:
        return message_bytes(problem, direction, message, widths) * unit

    def flops(block: Compute) -> float:
        pairs = problem.pairs[problem.span("query", block.queries), problem.span("keys", block.keys)]
        if pairs.shape != (len(block.query_segments), len(block.key_segments)):
            pairs = pairs[list(block.query_segments)][:, list(block.key_segments)]
        return float(pairs.sum()) * len(block.heads) * pair_flops

    return compile_schedule(schedule, size, flops, TENSORS[direction])


@dataclass(frozen=True)
class Prediction:
    """One strategy in one direction, one call of attention."""

    seconds: float
    compute: float  # seconds, of the rank that computes most
    exposed: float  # seconds of communication that no computing hides
    busiest_link: str  # that needs longest for its bytes
    busiest_bytes: float
    total_bytes: float  # all messages, once each
    memory: float  # bytes of other ranks' blocks that a rank holds at once, at most


def predict(program: Program, topology: Topology, machine: Machine) -> tuple[Prediction, Replay]:
    """Replay and sum up."""
    run = replay(program, topology, machine)
    busiest = int(np.argmax(run.link_bytes / topology.bandwidth[:-1]))
    return (
        Prediction(
            seconds=run.seconds,
            compute=run.compute_seconds,
            exposed=run.exposed,
            busiest_link=topology.name(busiest) if len(program.size) else "none",
            busiest_bytes=float(run.link_bytes[busiest]),
            total_bytes=float(program.size.sum()),
            memory=float(program.held.max()),
        ),
        run,
    )

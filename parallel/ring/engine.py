"""Runs a schedule: one loop for every strategy, forward and backward, inside one autograd function.

The loop moves tensors and waits; a worker says what an input, a block and a sum are in its direction. At any time a
rank holds its own tensors, the inputs of the current block and those arriving for the next, and likewise two sums in
flight: the extra memory does not grow with the number of ranks.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.ring.channel import Arrival, Channel
from parallel.ring.schedule import INPUTS, Message, Problem, Schedule, Step, Strategy
from parallel.ring.workers import Backward, Forward, Key, Masks, Shards, Worker


@lru_cache(maxsize=1024)
def last_uses(schedule: Schedule, rank: int) -> tuple[frozenset[Key], ...]:
    """For each step the inputs of other ranks that no later step uses."""
    later: set[Key] = {(kind, rank) for kind in INPUTS}
    dead: list[frozenset[Key]] = []
    for step in reversed(schedule.ranks[rank]):
        used: set[Key] = {(message.kind, message.owner) for message in step.sends if message.kind in INPUTS}
        for block in step.computes:
            used |= {("query", block.queries), ("keys", block.keys)}
        dead.append(frozenset(used - later))
        later |= used
    return tuple(dead[::-1])


class _Run:
    """The arrivals of one call and the waiting for them."""

    def __init__(self, worker: Worker, channel: Channel | None) -> None:
        self._worker, self._channel = worker, channel
        self._inputs: dict[Key, tuple[Message, list[Arrival]]] = {}
        self._sums: dict[Message, list[Arrival]] = {}

    def _exchange(self, step: Step) -> None:
        if self._channel is None:
            return
        self._channel.finish_sends()
        for message in step.receives:
            arrivals = self._channel.receive([(message.peer, room) for room in self._worker.room(message)])
            if message.kind in INPUTS:
                self._inputs[message.kind, message.owner] = (message, arrivals)
            else:
                self._sums[message] = arrivals
        parcels: list[tuple[int, Tensor]] = []
        for message in step.sends:
            self._await_input((message.kind, message.owner))
            parcels += [(message.peer, tensor) for tensor in self._worker.outgoing(message)]
        self._channel.send(parcels)

    def _await_input(self, key: Key) -> None:
        if key in self._inputs:
            message, arrivals = self._inputs.pop(key)
            self._worker.inputs[key] = (message.parts, [arrival.wait() for arrival in arrivals])

    def step(self, step: Step, dead: frozenset[Key]) -> None:
        self._exchange(step)
        for block in step.computes:
            self._await_input(("query", block.queries))
            self._await_input(("keys", block.keys))
            self._worker.compute(block)
        for message in step.merges:
            tensors = [arrival.wait() for arrival in self._sums.pop(message)]
            self._worker.add_to_sum(message.kind, message.owner, message.parts, tensors)
        for key in dead:
            self._worker.inputs.pop(key)

    def finish(self) -> None:
        if self._channel is not None:
            self._channel.finish_sends()


def run(schedule: Schedule, rank: int, worker: Worker, group: dist.ProcessGroup | None) -> None:
    """Execute this rank's steps; ``worker`` holds the results afterwards."""
    channel = None if group is None else Channel(group, worker.shards.q.device)
    execution = _Run(worker, channel)
    for step, dead in zip(schedule.ranks[rank], last_uses(schedule, rank), strict=True):
        execution.step(step, dead)
    execution.finish()


@dataclass(frozen=True, eq=False)
class Call:
    """Everything about an attention call but its tensors."""

    strategy: Strategy
    problem: Problem
    rank: int
    group: dist.ProcessGroup | None
    masks: Masks
    scale: float


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        worker = Forward(call.problem, call.rank, Shards(q, k, v), call.masks, call.scale)
        run(call.strategy.forward(call.problem), call.rank, worker, call.group)
        wide_out, lse = worker.result()
        out = wide_out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mark_non_differentiable(lse)
        ctx.call = call
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        q, k, v, out, lse = ctx.saved_tensors
        call: Call = ctx.call
        d_out = grad_outputs[0].to(q.dtype).contiguous()
        delta = torch.linalg.vecdot(d_out.to(lse.dtype), out.to(lse.dtype))
        worker = Backward(call.problem, call.rank, Shards(q, k, v), call.masks, call.scale, (d_out, lse, delta))
        run(call.strategy.backward(call.problem), call.rank, worker, call.group)
        dq, dk, dv = worker.result()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None


def attention(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of this rank's queries over all ranks' keys; differentiable through ``out``.

    Shapes: q and out ``[batch, local_seq, heads, head_dim]``, k and v ``[batch, local_seq, kv_heads, head_dim]``, lse
    ``[batch, local_seq, heads]``. The backward pass communicates: all ranks must take it, in the same order.
    """
    out, lse = _Attention.apply(q.contiguous(), k.contiguous(), v.contiguous(), call)  # pyright: ignore[reportGeneralTypeIssues]
    return out, lse

"""The processes of ranks as their machine's kernel sees them: their state, their stacks, their end.

A rank that hangs answers no call, and one that is stopped (SIGSTOP) not even a signal; so these functions run beside
it, in the driver where it is on the same machine and in a task on its node elsewhere.
"""

import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.rendezvous import Seat

STACK_SIGNAL = signal.SIGUSR2  # a rank answers it with the stack of every thread, in its log
STACK_TIMEOUT_SEC = 3.0
KILL_TIMEOUT_SEC = 10.0
HOST_TIMEOUT_SEC = 25.0  # for all machines together; one that is gone does not answer
POLL_SEC = 0.05

Work = Callable[[list[int]], dict[int, str]]


def on_hosts(seats: Sequence[Seat], work: Work, timeout_sec: float = HOST_TIMEOUT_SEC) -> dict[int, str]:
    """Call ``work(pids)`` on every machine of ``seats`` at once; return what it found, by index into ``seats``.

    Machines that do not answer in time are left out.
    """
    hosts: dict[str, list[int]] = defaultdict(list)
    for index, seat in enumerate(seats):
        hosts[seat.node].append(index)
    here = ray.get_runtime_context().get_node_id()
    tasks = {}
    for node in hosts:
        if node != here:
            strategy = NodeAffinitySchedulingStrategy(node, soft=False)
            task = ray.remote(work).options(num_cpus=0, max_retries=0, scheduling_strategy=strategy)
            tasks[task.remote([seats[index].pid for index in hosts[node]])] = node
    answers = {here: work([seats[index].pid for index in hosts[here]])} if here in hosts else {}
    ready, _ = ray.wait(list(tasks), num_returns=len(tasks), timeout=timeout_sec) if tasks else ([], [])
    for ref in ready:
        with suppress(RayError):
            answers[tasks[ref]] = ray.get(ref)
    return {
        index: answer[seats[index].pid]
        for node, answer in answers.items()
        for index in hosts[node]
        if seats[index].pid in answer
    }


def state(pid: int) -> str:
    """Return the kernel's letter for what a process does (R, S, D, T ...); empty: it is gone, or a zombie."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    return "" if letter in "ZX" else letter


def dump_stacks(pids: list[int]) -> dict[int, str]:
    """Have the stack of every thread written into the ranks' logs; return the state that each process was in.

    A stopped process is continued for it: only then it can answer.
    """
    found = {pid: letter for pid in pids if (letter := state(pid))}
    for pid in found:
        with suppress(ProcessLookupError):
            os.kill(pid, STACK_SIGNAL)
            os.kill(pid, signal.SIGCONT)
    deadline = time.monotonic() + STACK_TIMEOUT_SEC
    while any(_pending(pid) for pid in found) and time.monotonic() < deadline:
        time.sleep(POLL_SEC)
    time.sleep(POLL_SEC)  # from the delivery of the signal to the last line
    return found


def _pending(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in lines if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (STACK_SIGNAL - 1) & 1 for mask in masks)


def await_death(pids: list[int]) -> dict[int, str]:
    """Wait until the processes are gone, so that a next attempt never writes beside an old one; insist if need be."""
    deadline = time.monotonic() + KILL_TIMEOUT_SEC / 2
    insisted = False
    while remaining := [pid for pid in pids if state(pid)]:
        if time.monotonic() > deadline:
            if insisted:
                break
            for pid in remaining:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            insisted, deadline = True, time.monotonic() + KILL_TIMEOUT_SEC
        time.sleep(POLL_SEC)
    return {}

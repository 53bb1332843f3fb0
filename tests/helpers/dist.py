"""Run a function on several gloo ranks from a test: one call, results in rank order, no process left behind."""

import multiprocessing as mp
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

_POLL_SEC = 1.0
_LAST_WORDS_SEC = 6.0  # more than a rank takes to find out which other one is lost


class RankError(AssertionError):
    """A rank of :func:`run_distributed` failed; the text holds its traceback."""


def _defaults() -> dict[str, str]:
    values = {"OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        values["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve must not break a test
    return values


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables that the children must find before they import torch; what the caller set stays."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _rank_main(
    fn: Callable[..., Any],
    rank: int,
    world_size: int,
    folder: str,
    timeout: float,
    args: tuple[Any, ...],
    prepare: Callable[[int], None] | None,
) -> None:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import FileStore

    torch.set_num_threads(1)
    path = Path(folder)
    try:
        if prepare is not None:
            prepare(rank)
        store = FileStore(str(path / "store"), world_size)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        result = fn(rank, world_size, *args)
        (path / f"result-{rank}").write_bytes(pickle.dumps(result))
        dist.barrier()  # no rank tears its connections down while another still uses them
        dist.destroy_process_group()
    except BaseException:
        (path / f"error-{rank}").write_text(f"{time.time()}\n{traceback.format_exc()}")
        sys.stderr.flush()
        os._exit(1)  # the exit handlers of a broken group could wait for its peers


def _describe(processes: list[BaseProcess], folder: Path) -> str:
    """The ranks' tracebacks, the one that failed first on top: the others are usually its consequences."""
    reports: list[tuple[float, str]] = []
    for rank, process in enumerate(processes):
        file = folder / f"error-{rank}"
        if file.exists():
            when, _, text = file.read_text().partition("\n")
            reports.append((float(when), f"--- rank {rank} ---\n{text}"))
        elif process.exitcode not in (0, None, -signal.SIGKILL):
            reports.append((0.0, f"--- rank {rank} --- ended with exit code {process.exitcode}, no traceback"))
    return "\n".join(text for _, text in sorted(reports))


def run_distributed(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 120,
    prepare: Callable[[int], None] | None = None,
) -> list[Any]:
    """Call ``fn(rank, world_size, *args)`` on ``world_size`` spawned processes and return the results by rank.

    ``fn`` is a picklable top-level function; gloo is initialised (through a file store in a temporary folder) before
    it is called and destroyed after it; ``prepare(rank)`` comes before both. A rank that fails ends the others and
    raises :class:`RankError` with its traceback; after ``timeout`` seconds all ranks are killed and TimeoutError is
    raised.
    """
    context = mp.get_context("spawn")
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        processes: list[BaseProcess] = []
        try:
            with _environment(_defaults()):
                for rank in range(world_size):
                    process = context.Process(
                        target=_rank_main, args=(fn, rank, world_size, name, timeout, args, prepare), daemon=True
                    )
                    process.start()
                    processes.append(process)
            while any(process.is_alive() for process in processes):
                if any(process.exitcode not in (0, None) for process in processes):
                    # The first failure breaks its peers' connections: leave them time to say so, then stop them.
                    last = time.monotonic() + _LAST_WORDS_SEC
                    while (alive := [p.sentinel for p in processes if p.is_alive()]) and time.monotonic() < last:
                        wait(alive, timeout=_POLL_SEC)
                    break
                if time.monotonic() > deadline:
                    alive = [rank for rank, process in enumerate(processes) if process.is_alive()]
                    raise TimeoutError(f"ranks {alive} of {fn.__qualname__} still ran after {timeout} s")
                wait([process.sentinel for process in processes if process.is_alive()], timeout=_POLL_SEC)
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
            for process in processes:
                with suppress(AssertionError):
                    process.join(10)
        if any(process.exitcode != 0 for process in processes):
            raise RankError(f"{fn.__qualname__} failed\n{_describe(processes, folder)}")
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]

"""Checkpoints beside training: the tensors are copied into CPU memory, and a thread writes the copies."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from conf.errors import ResourceError
from trainers.checkpoint import Checkpoints
from trainers.checkpoint_folder import step_of
from trainers.observer import Observer

MAX_UNSAVED = 3  # checkpoints in a row that may fail before the run ends


class Saver:
    """Writes the checkpoints of a run, one at a time; a context manager that leaves no write behind.

    The threads of all ranks work together over the process group of ``checkpoints``, which nothing else uses while one
    is written. Every method is called by all ranks after the same step; that all threads are done is agreed with the
    stop flag (``cancel.agree``). Until ``finish`` the checkpoint before is the newest, whatever is killed.
    """

    def __init__(self, checkpoints: Checkpoints, observer: Observer) -> None:
        self._checkpoints, self._observer = checkpoints, observer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[tuple[Path, float]] | None = None
        self._unsaved, self._step = 0, 0
        self._cost: dict[str, float] = {}
        self.newest: Path | None = None  # complete, of this process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._thread.shutdown()

    @property
    def writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._writing is not None and not self._writing.done()

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """Copy the tensors and let the thread write them with ``state``; none may be pending."""
        assert self._writing is None, "one checkpoint at a time"
        started = time.perf_counter()
        self._step = int(state["step"])
        tensors = self._checkpoints.snapshot(model, optimizer)
        self._writing = self._thread.submit(self._write, tensors, state, started)
        self._stalled(started)

    def _write(self, tensors: dict[str, Any], state: dict[str, Any], started: float) -> tuple[Path, float]:
        path = self._checkpoints.save(tensors, state, self._observer.before_checkpoint)
        return path, time.perf_counter() - started

    def finish(self, last: bool = False) -> None:
        """Wait for the pending checkpoint, if there is one, and record it.

        Raises:
            ResourceError: it could not be written, and it was the ``last`` one or one too many.
        """
        if self._writing is None:
            return
        started, writing, self._writing = time.perf_counter(), self._writing, None
        try:
            self.newest, self._cost["time/checkpoint_sec"] = writing.result()
        except ResourceError as error:  # on all ranks alike; disks fill up and are emptied again
            self._unsaved += 1
            if last or self._unsaved > MAX_UNSAVED:
                raise
            self._observer.log(f"WARNING: no checkpoint after step {self._step}, training goes on: {error.rule}")
            return
        self._stalled(started)
        self._unsaved = 0
        self._observer.checkpoint(step_of(self.newest), self.newest)

    def _stalled(self, since: float) -> None:
        stall = self._cost.get("time/checkpoint_stall_sec", 0.0)
        self._cost["time/checkpoint_stall_sec"] = stall + time.perf_counter() - since

    def cost(self) -> dict[str, float]:
        """Metrics of what was saved since the last call."""
        cost, self._cost = self._cost, {}
        return cost

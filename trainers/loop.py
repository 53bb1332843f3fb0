"""The training loop, whatever is trained: steps, evaluations, records and checkpoints until the last step or a stop."""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from conf.errors import ResourceError
from conf.schema import RunConfig
from trainers.cancel import any_stopping
from trainers.checkpoint import Checkpoints
from trainers.checkpoint_folder import step_folder
from trainers.control import Control
from trainers.observer import Observer
from trainers.runtime import Runtime
from trainers.state import StateWriter, TrainState
from trainers.throughput import Meter

MAX_UNSAVED = 3  # checkpoints in a row that may fail before the run ends


class Task(Protocol):
    """What is trained, and on what."""

    @property
    def step_tokens(self) -> int:
        """Tokens that one optimizer step sees over all ranks."""
        ...

    def batch(self, step: int) -> Any:
        """What this rank learns from in the optimizer step with that 0-based index."""
        ...

    def step(self, batch: Any, step: int) -> dict[str, float]:
        """Do the optimizer step; returns its metrics, ``train/loss`` among them. Collective."""
        ...

    def evaluate(self, step: int) -> dict[str, float]:
        """Metrics after ``step`` optimizer steps, ``eval/loss`` among them. Collective."""
        ...


@dataclass(frozen=True)
class Parts:
    """Everything that the loop uses, built."""

    task: Task
    model: nn.Module
    optimizer: torch.optim.Optimizer
    checkpoints: Checkpoints
    observer: Observer
    meter: Meter
    writer: StateWriter


def train(config: RunConfig, control: Control, runtime: Runtime, parts: Parts, state: TrainState) -> dict[str, Any]:
    """Train from ``state`` on. Every rank calls it; collective throughout.

    Returns, on every rank, ``status`` ("done" or "stopped"), ``step`` (optimizer steps done), ``tokens``, ``loss``,
    ``eval_loss``, ``resumed_from`` (step) and ``checkpoint`` (path).
    """
    trainer, task = config.trainer, parts.task
    resumed_from = saved_at = state.step
    stopped, unsaved = False, 0
    cost: dict[str, float] = {}  # of the checkpoint before
    while state.step < trainer.steps and not stopped:
        parts.meter.start()
        batch = task.batch(state.step)
        parts.meter.data_is_here()
        values = task.step(batch, state.step)
        state.advance(task.step_tokens, values["train/loss"])
        values |= cost | parts.meter.stop(task.step_tokens, state.tokens) | {"train/tokens": state.tokens}
        if due(state.step, trainer.eval_every, trainer.steps):
            started = time.perf_counter()
            values |= task.evaluate(state.step)
            state.eval_loss = values["eval/loss"]
            values["time/eval_sec"] = time.perf_counter() - started
        parts.observer.step(state.step, values)

        stopped = any_stopping(control.stopping(), runtime.device)
        cost = {}
        if stopped or due(state.step, trainer.checkpoint_every, trainer.steps):
            try:
                cost = _save(parts, state)
                saved_at, unsaved = state.step, 0
            except ResourceError as error:  # on all ranks alike; disks fill up and are emptied again
                unsaved += 1
                if stopped or state.step == trainer.steps or unsaved > MAX_UNSAVED:
                    raise
                parts.observer.log(f"WARNING: no checkpoint after step {state.step}, training goes on: {error.rule}")
    return {
        "status": "done" if state.step >= trainer.steps else "stopped",
        "step": state.step,
        "tokens": state.tokens,
        "loss": state.loss,
        "eval_loss": state.eval_loss,
        "resumed_from": resumed_from,
        "checkpoint": str(step_folder(parts.checkpoints.folder, saved_at)) if saved_at else "",
    }


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) and after the last one happens after ``step``."""
    return every > 0 and (step % every == 0 or step == last)


def _save(parts: Parts, state: TrainState) -> dict[str, float]:
    """Write a checkpoint after the records that lead to it, and return what it cost."""
    started = time.perf_counter()
    record = parts.writer.to_json(state)
    path = parts.checkpoints.save(parts.model, parts.optimizer, record, first=parts.observer.before_checkpoint)
    parts.observer.checkpoint(state.step, path)
    return {"time/checkpoint_sec": time.perf_counter() - started}

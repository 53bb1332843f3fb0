"""The training loop, whatever is trained: steps, evaluations, records and checkpoints until the last step or a stop."""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from conf.schema import RunConfig
from trainers.cancel import agree
from trainers.checkpoint import Checkpoints
from trainers.checkpoint_folder import step_folder
from trainers.control import Control
from trainers.observer import Observer
from trainers.runtime import Runtime
from trainers.saver import Saver
from trainers.state import StateWriter, TrainState
from trainers.throughput import Meter


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
    resumed_from = state.step
    with Saver(parts.checkpoints, parts.observer) as saver:
        _steps(config, control, runtime, parts, state, saver)
    newest = saver.newest or (step_folder(parts.checkpoints.folder, resumed_from) if resumed_from else None)
    return {
        "status": "done" if state.step >= config.trainer.steps else "stopped",
        "step": state.step,
        "tokens": state.tokens,
        "loss": state.loss,
        "eval_loss": state.eval_loss,
        "resumed_from": resumed_from,
        "checkpoint": str(newest or ""),
    }


def _steps(
    config: RunConfig, control: Control, runtime: Runtime, parts: Parts, state: TrainState, saver: Saver
) -> None:
    trainer, task, stopped = config.trainer, parts.task, False
    while state.step < trainer.steps and not stopped:
        parts.meter.start()
        batch = task.batch(state.step)
        parts.meter.data_is_here()
        values = task.step(batch, state.step)
        state.advance(task.step_tokens, values["train/loss"])
        values |= saver.cost() | parts.meter.stop(task.step_tokens, state.tokens) | {"train/tokens": state.tokens}
        if due(state.step, trainer.eval_every, trainer.steps):
            started = time.perf_counter()
            values |= task.evaluate(state.step)
            state.eval_loss = values["eval/loss"]
            values["time/eval_sec"] = time.perf_counter() - started
        parts.observer.step(state.step, values)

        stopped, writing = agree(control.stopping(), saver.writing, runtime.device)
        save = stopped or due(state.step, trainer.checkpoint_every, trainer.steps)
        if save or not writing:
            saver.finish()
        if save:
            saver.begin(parts.model, parts.optimizer, parts.writer.to_json(state))
        if stopped or state.step == trainer.steps:
            saver.finish(last=True)


def due(step: int, every: int, last: int) -> bool:
    """Whether something that happens every ``every`` steps (0: never) and after the last one happens after ``step``."""
    return every > 0 and (step % every == 0 or step == last)

"""What a step is worth telling: numbers combined over ranks, recorded and announced by rank 0."""

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

from conf.schema import RunConfig
from data.files import write_atomic
from data.tokenize import Tokenizer
from trainers import lineage
from trainers.control import Control
from trainers.metrics import MAX, reduced_by
from trainers.runtime import Runtime
from trainers.tracking import Tracker
from trainers.usage import Usage

RECENT_STEPS = 20  # that the estimate of the time left looks at


def combine(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Return ``values`` reduced over all ranks as the metrics table says. Collective: all ranks pass the same names."""
    names = reduced_by(MAX, values)
    packed = torch.tensor([values[name] for name in names], dtype=torch.float64, device=device)
    dist.all_reduce(packed, op=dist.ReduceOp.MAX)
    return {**values, **dict(zip(names, packed.tolist(), strict=True))}


class Observer:
    """Records and announces on rank 0 and does nothing on other ranks. Never changes what training does."""

    def __init__(self, config: RunConfig, control: Control, runtime: Runtime) -> None:
        self._config, self._control, self._runtime = config, control, runtime
        self._tracker: Tracker | None = None
        self._usage = Usage(runtime.io_group)
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._tracker is not None:
            self._tracker.close(finished=error[0] is None)

    def start(self, run_id: str, resume_step: int) -> None:
        """Open the records of a run that has done ``resume_step`` steps, and write where its data comes from."""
        if self._runtime.rank != 0:
            return
        origin = json.dumps(lineage.stages(self._config), indent=1)
        write_atomic(Path(self._config.run_dir) / lineage.FILE_NAME, origin + "\n")
        self._tracker = Tracker(self._config, run_id, resume_step, self._runtime.world_size, self.log)

    def log(self, message: str) -> None:
        """Tell a person something."""
        if self._runtime.rank == 0:
            self._control.emit({"kind": "log", "message": message})

    def step(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Record the metrics of ``step``; announce them every ``log_every`` steps, at the ends and with evaluations.

        Collective; returns the combined metrics.
        """
        trainer = self._config.trainer
        combined = combine(values, self._runtime.device)
        announced = step in (1, trainer.steps) or step % trainer.log_every == 0 or "eval/loss" in combined
        if announced:
            combined |= self._usage.of_all_ranks()
        if self._tracker is None:
            return combined
        self._tracker.log(step, combined)
        self._recent.append(combined["time/step_sec"])
        if announced:
            eta = (trainer.steps - step) * sum(self._recent) / len(self._recent)
            self._control.emit({"kind": "metrics", "step": step, "steps": trainer.steps, "eta_sec": eta, **combined})
        return combined

    def samples(self, step: int, prompts: torch.Tensor, continuations: torch.Tensor, tokenizer: Tokenizer) -> None:
        """Record continuations of held-out text, token ids of shape [texts, tokens]."""
        if self._tracker is None:
            return
        rows: list[dict[str, Any]] = [
            {"prompt": tokenizer.decode(prompt), "continuation": tokenizer.decode(continuation)}
            for prompt, continuation in zip(prompts.tolist(), continuations.tolist(), strict=True)
        ]
        self._tracker.samples(step, rows)
        self._control.emit({"kind": "samples", "step": step, "rows": rows})

    def before_checkpoint(self) -> None:
        """Make the records of the steps in a checkpoint durable before the checkpoint is."""
        if self._tracker is not None:
            self._tracker.sync()

    def checkpoint(self, step: int, path: Path) -> None:
        """Record and announce a complete checkpoint."""
        if self._tracker is not None:
            self._tracker.checkpoint(step, path)
        if self._runtime.rank == 0:
            self._control.emit({"kind": "checkpoint", "step": step, "path": str(path)})

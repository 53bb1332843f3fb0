"""The learning rate as a function of the step alone: nothing to save, nothing to restore."""

import math

from conf.schema import TrainerConfig


def learning_rate(step: int, trainer: TrainerConfig) -> float:
    """Return the rate of the optimizer step with 0-based index ``step``.

    Linear warmup over ``warmup_steps`` (the first step has ``lr / warmup_steps``, the last one ``lr``), then half a
    cosine from ``lr`` down to ``lr * min_lr_fraction``, which the last step of the run has. Later steps stay there.
    """
    if step < trainer.warmup_steps:
        return trainer.lr * (step + 1) / trainer.warmup_steps
    decay_steps = trainer.steps - trainer.warmup_steps
    progress = min((step - trainer.warmup_steps + 1) / max(decay_steps, 1), 1.0)
    floor = trainer.min_lr_fraction
    return trainer.lr * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress)))

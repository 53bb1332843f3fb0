"""AdamW with decoupled weight decay on matrices only."""

import torch
from torch import nn

from conf.schema import TrainerConfig


def build_optimizer(model: nn.Module, trainer: TrainerConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters of ``model``, after it was sharded.

    Parameters with two or more dimensions (projections, embeddings) decay; gains do not. The rate is set anew at
    every step by :func:`set_learning_rate`. ``fused`` does the update of a group in one kernel, on a CPU too.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": trainer.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=trainer.lr,
        betas=(trainer.beta1, trainer.beta2),
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every parameter group the rate of this step."""
    for group in optimizer.param_groups:
        group["lr"] = rate

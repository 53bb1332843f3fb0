"""Activation checkpointing: keep a block's inputs, compute its activations again in the backward pass."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """Attention over ranks keeps its result: to compute it again would repeat its communication."""
    if getattr(operator, "namespace", None) == "sundog":
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputed:
    """Mixed in before a module's own class. Unlike a wrapper module it leaves the names of parameters alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # pyright: ignore[reportAttributeAccessIssue] (the module's own)
        # There is no dropout, so the random state need not be kept.
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, _policy),
            **kwargs,
        )


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Checkpoint each block."""
    for block in blocks:
        own = type(block)
        block.__class__ = type(f"Recomputed{own.__name__}", (_Recomputed, own), {})

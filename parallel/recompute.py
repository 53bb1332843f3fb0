"""Activation checkpointing: keep a block's inputs, compute its activations again in the backward pass."""

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


class _Recomputed:
    """Mixed in before a module's own class. Unlike a wrapper module it leaves the names of parameters alone."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # pyright: ignore[reportAttributeAccessIssue] (the module's own)
        # There is no dropout, so the random state need not be kept.
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def recompute_blocks(blocks: nn.ModuleList) -> None:
    """Checkpoint each block. Attention inside is computed again with its communication; all ranks do so in step."""
    for block in blocks:
        own = type(block)
        block.__class__ = type(f"Recomputed{own.__name__}", (_Recomputed, own), {})

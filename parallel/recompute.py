"""Activation checkpointing: keep a block's inputs, compute its activations again in the backward pass."""

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# What selective keeps besides attention over ranks: matrix products and attention, by name of torch's operators.
EXPENSIVE = ("mm", "addmm", "bmm", "linear", "_linear_pointwise")
ATTENTION = "_scaled_dot_product_"


def _policy(selective: bool, _: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    """Attention over ranks keeps its result always: to compute it again would repeat its communication."""
    name = str(getattr(operator, "_opname", ""))
    if getattr(operator, "namespace", None) == "sundog":
        return CheckpointPolicy.MUST_SAVE
    if selective and (name in EXPENSIVE or name.startswith(ATTENTION)):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


class _Recomputed:
    """Mixed in before a module's own class. Unlike a wrapper module it leaves the names of parameters alone."""

    selective: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # pyright: ignore[reportAttributeAccessIssue] (the module's own)
        # There is no dropout, so the random state need not be kept.
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=partial(create_selective_checkpoint_contexts, partial(_policy, self.selective)),
            **kwargs,
        )


def recompute_blocks(blocks: nn.ModuleList, kind: str) -> None:
    """Checkpoint each block: ``full``, or ``selective``, which keeps the results of matrix products and attention and
    computes again what is cheap (norms, rotation, SwiGLU's product)."""
    for block in blocks:
        own = type(block)
        block.__class__ = type(f"Recomputed{own.__name__}", (_Recomputed, own), {"selective": kind == "selective"})

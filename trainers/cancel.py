"""Stopping together: a rank that stops alone leaves its peers in a collective until the timeout."""

import torch
import torch.distributed as dist


def agree(stopping: bool, writing: bool, device: torch.device) -> tuple[bool, bool]:
    """Return on every rank whether any rank was asked to stop, and whether any still writes a checkpoint.

    Collective over all ranks; called once a step.
    """
    flags = torch.tensor([float(stopping), float(writing)], device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    any_stopping, any_writing = (flags > 0).tolist()
    return any_stopping, any_writing

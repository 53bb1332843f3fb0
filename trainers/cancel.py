"""Stopping together: a rank that stops alone leaves its peers in a collective until the timeout."""

import torch
import torch.distributed as dist


def any_stopping(stopping: bool, device: torch.device) -> bool:
    """Return on every rank whether any rank was asked to stop. Collective over all ranks; called once a step."""
    flag = torch.tensor([float(stopping)], device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag.item() > 0)

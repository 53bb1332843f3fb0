"""Gradients over ranks: how they are scaled, when they are exchanged, their norm."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel.mesh import Mesh


def scale_factor(mesh: Mesh) -> int:
    """What a rank's loss is multiplied by before its backward pass: the number of ranks.

    DDP and FSDP2 average gradients over all ranks, of which each has seen other tokens; the mean over all tokens needs
    their sum. So with ``loss_sum`` over a rank's own tokens and ``labels`` counted over all ranks (and micro batches),
    ``(loss_sum * scale_factor(mesh) / labels).backward()`` leaves on every rank the gradients of the mean loss, as one
    process would have them.
    """
    return mesh.size


@contextmanager
def no_sync(model: nn.Module, enabled: bool) -> Iterator[None]:
    """While ``enabled``, backward passes add to local gradients and leave the exchange to a later one."""
    if not enabled:
        yield
    elif isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


def clip_grad_norm(model: nn.Module, max_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most ``max_norm``; return the norm before, a scalar.

    Collective where gradients are sharded; every rank gets the same norm. ``max_norm=inf`` only measures.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if max_norm != float("inf"):
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm

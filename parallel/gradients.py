"""Gradients over ranks: how they are scaled, when they are exchanged, their norm."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from parallel.mesh import Mesh
from parallel.zero import ZeroModel


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
    elif isinstance(model, (DistributedDataParallel, ZeroModel)):
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


def update(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float, mesh: Mesh) -> Tensor:
    """Clip, let the optimizer step and drop the gradients; return the global norm before clipping, a scalar.

    Where the norm is not finite the weights stay as they are. Collective; ``max_norm=inf`` does not clip.
    """
    if isinstance(model, ZeroModel):
        return model.step()
    norm = clip_grad_norm(model, max_norm, mesh)
    if math.isfinite(norm.item()):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def clip_grad_norm(model: nn.Module, max_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their global L2 norm is at most ``max_norm``; return the norm before, a scalar.

    Collective where gradients are sharded; every rank gets the same norm. ``max_norm=inf`` only measures.
    """
    norms = []
    sharings = by_mesh(model)
    for parameters in sharings:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    norm = torch.linalg.vector_norm(torch.stack(norms)) if len(norms) > 1 else norms[0]
    if max_norm != float("inf"):
        for parameters in sharings:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def by_mesh(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters that have gradients, those that are sharded over the same ranks together."""
    found: dict[object, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.grad is not None:
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            found.setdefault(mesh, []).append(parameter)
    return list(found.values())

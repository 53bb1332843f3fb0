"""Whole parameters on every rank, gradients averaged over all of them (PyTorch DDP)."""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from parallel.mesh import Mesh


def replicate_parameters(model: nn.Module, mesh: Mesh) -> nn.Module:
    """Wrap the model: gradients are averaged over ``dp_replicate x cp``, which are all ranks.

    The parameters stay fp32; for bf16 the caller runs the forward pass under ``torch.autocast``. A single rank needs
    no wrapper and gets the model back.
    """
    if mesh.size == 1:
        return model
    return DistributedDataParallel(model, gradient_as_bucket_view=True)

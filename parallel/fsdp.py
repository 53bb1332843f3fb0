"""Parameters, gradients and optimizer state sharded over ranks (PyTorch FSDP2)."""

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from parallel.mesh import Mesh


def shard_parameters(model: nn.Module, blocks: nn.ModuleList, mesh: Mesh, precision: str) -> None:
    """Shard in place: each block, then the rest, over ``dp_shard x cp``, with equal copies over ``dp_replicate``.

    The ``cp`` ranks take part because they hold equal parameters and different tokens, as data-parallel ranks do.
    Gathered parameters are cast once in bf16 runs; gradients are always reduced in fp32.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    for block in blocks:
        fully_shard(block, mesh=mesh.fsdp, mp_policy=policy)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=policy)

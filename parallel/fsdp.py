"""Parameters, gradients and optimizer state sharded over ranks (PyTorch FSDP2)."""

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from models.moe.layer import Experts
from models.moe.router import Router
from parallel.mesh import Mesh


def shard_parameters(model: nn.Module, blocks: nn.ModuleList, mesh: Mesh, precision: str, offload: bool) -> None:
    """Shard in place: each block, then the rest, over ``dp_shard x cp``, with equal copies over ``dp_replicate``.

    The ``cp`` ranks take part because they hold equal parameters and different tokens, as data-parallel ranks do.
    Gathered parameters are cast once in bf16 runs; gradients are always reduced in fp32. Routers stay in fp32. Experts
    that are spread over ranks are units of their own, so that nothing else is exchanged between their two all-to-alls,
    sharded over the ranks that hold the same ones; their gradients, which hold the sums of several ranks' tokens, are
    divided as all others are. ``offload`` keeps parameters, gradients and optimizer state in CPU memory between uses.
    """
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if precision == "bf16"
        else MixedPrecisionPolicy()
    )
    keep = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in blocks:
        for module in block.modules():
            if isinstance(module, Router) and precision == "bf16":
                exact = MixedPrecisionPolicy(cast_forward_inputs=False)
                fully_shard(module, mesh=mesh.fsdp, mp_policy=exact, offload_policy=keep)
            if isinstance(module, Experts) and mesh.sizes.ep > 1:
                unit = fully_shard(
                    module,
                    mesh=mesh.expert_fsdp,
                    mp_policy=policy,
                    offload_policy=keep,
                    shard_placement_fn=lambda _: Shard(1),
                )
                unit.set_gradient_divide_factor(mesh.size)
        fully_shard(block, mesh=mesh.fsdp, mp_policy=policy, offload_policy=keep)
    fully_shard(model, mesh=mesh.fsdp, mp_policy=policy, offload_policy=keep)

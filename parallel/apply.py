"""Make a model parallel: the only place that knows the order in which the parts are applied."""

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conf.schema import RunConfig
from conf.shard import FSDP, ZERO
from models.decoder import Decoder
from parallel.attention import SequenceParallelCore
from parallel.ddp import replicate_parameters
from parallel.experts import spread_experts
from parallel.fsdp import shard_parameters
from parallel.mesh import Mesh
from parallel.recompute import recompute_blocks
from parallel.zero import ZeroModel, shard_by_zero


def parallelize(model: Decoder, mesh: Mesh, config: RunConfig) -> nn.Module:
    """Apply sequence parallelism, recomputation and data parallelism to a model that is equal on all ranks.

    Call the result as the model itself: ``model(tokens, positions, document_ids, labels=labels)`` with this rank's
    shard of the windows (``parallel.batch.shard_batch``) gives the sum of the token losses of that shard and their
    number. Gradients: see ``parallel.gradients.scale_factor``.

    Under fsdp and hsdp the same object comes back with sharded parameters, in bf16 runs cast by FSDP's policy. Under
    ddp it is wrapped (see :func:`unwrap`) and the caller chooses the precision by ``torch.autocast``. ZeRO wraps it in
    :func:`take_optimizer`.
    """
    if mesh.cp_size > 1:
        sequence = config.sequence
        strategy = sequence.strategy if sequence.backward == "same" else f"{sequence.strategy}/{sequence.backward}"
        core = SequenceParallelCore(mesh.cp_group, strategy, sequence.layout, sequence.timeout)
        model.set_attention_core(core)
    spread_experts(model, mesh, config.sequence.layout)
    if config.trainer.recompute != "none":
        recompute_blocks(model.layers, config.trainer.recompute)
    kind = config.sharding.kind
    if kind in FSDP:
        shard_parameters(model, model.layers, mesh, config.trainer.precision, config.sharding.offload == "all")
    return replicate_parameters(model, mesh) if kind == "ddp" else model


def take_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, mesh: Mesh, config: RunConfig) -> nn.Module:
    """The last part of :func:`parallelize`, once there is an optimizer: ZeRO takes both, other models come back."""
    if config.sharding.kind not in ZERO:
        return model
    return shard_by_zero(model, optimizer, config, mesh.device_mesh.device_type)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside what :func:`parallelize` returned, with its own names of parameters."""
    return model.module if isinstance(model, (DistributedDataParallel, ZeroModel)) else model

"""Optimizer state, then gradients, then parameters spread over ranks (DeepSpeed ZeRO 1 to 3, arXiv:1910.02054)."""

import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.schema import RunConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
LARGEST_BUCKET = 500_000_000  # numbers that are exchanged at once, DeepSpeed's own default


class ZeroModel(nn.Module):
    """A model with its optimizer in the hands of DeepSpeed's engine; called as the model itself.

    All ranks are data-parallel ones to the engine, those that share a sequence too: with a sequence-parallel group of
    its own it would scale gradients by another factor in stage 3 than before it. So gradients are means over all
    ranks, as under DDP and FSDP2 (``parallel.gradients.scale_factor``).
    """

    def __init__(self, engine: Any, stage: int) -> None:
        super().__init__()
        self.engine, self.stage = engine, stage
        names = sorted(engine.module.state_dict(keep_vars=True))
        self._owners = {name: index % dist.get_world_size() for index, name in enumerate(names)}
        if isinstance(engine.optimizer.optimizer, torch.optim.AdamW):
            self._create_moments()

    @property
    def module(self) -> nn.Module:
        """The model inside."""
        return self.engine.module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.engine(*args, **kwargs)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add up gradients that a later one completes."""
        self.engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self.engine.set_gradient_accumulation_boundary(True)

    def step(self) -> Tensor:
        """Clip, update the weights and drop the gradients; return the global norm before clipping. Collective.

        Where the norm is not finite the weights stay as they are.
        """
        self.engine.step()
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float("inf") if norm is None else norm, dtype=torch.float32)

    def gather(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return whole weights and AdamW moments in CPU memory, each on one rank: this rank's share. Collective.

        Names are those of ``torch.distributed.checkpoint.state_dict``, so that what is saved can be loaded under any
        sharding. One tensor is whole on all ranks at a time.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        weights: dict[str, Tensor] = {}
        moments: dict[str, Tensor] = {}
        whole: Any
        for name, value, mine in self._entries():
            whole = safe_get_full_fp32_param(value) if isinstance(value, nn.Parameter) else value
            if mine:
                weights[name] = whole.detach().cpu().clone()
        for name, parameter in self.module.named_parameters():
            for kind in MOMENTS:
                whole = safe_get_full_optimizer_state(parameter, kind)
                if self._mine(name):
                    moments[f"state.{name}.{kind}"] = whole.cpu().clone()
            if self._mine(name):
                moments[f"state.{name}.step"] = self._steps().detach().cpu().clone()
        return weights, moments

    def empty(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return tensors with the names and shapes of :meth:`gather` to load into."""
        weights = {name: _blank(value) for name, value, mine in self._entries() if mine}
        moments: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            if self._mine(name):
                moments |= {f"state.{name}.{kind}": _blank(parameter) for kind in MOMENTS}
                moments[f"state.{name}.step"] = torch.zeros(())
        return weights, moments

    def scatter(self, weights: dict[str, Tensor], moments: dict[str, Tensor], group: dist.ProcessGroup) -> None:
        """Take over what :meth:`gather` returned, or what was loaded into :meth:`empty`. Collective over ``group``."""
        for name, value, _ in self._entries():
            whole = self._sent(weights.get(name), value, name, group)
            if isinstance(value, nn.Parameter):
                self._set(value, whole, None)
            else:
                value.copy_(whole)
        for name, parameter in self.module.named_parameters():
            for kind in MOMENTS:
                whole = self._sent(moments.get(f"state.{name}.{kind}"), parameter, name, group)
                self._set(parameter, whole, kind)
            steps = moments.get(f"state.{name}.step", torch.zeros(()))
            dist.broadcast(steps, group_src=self._owners[name], group=group)
            for flat in self._flat():  # all parameters have done the same number of steps
                self.engine.optimizer.optimizer.state[flat]["step"].copy_(steps)

    def _entries(self) -> Iterator[tuple[str, Tensor, bool]]:
        """Parameters and buffers as a state dict names them, and whether this rank keeps them."""
        for name, value in self.module.state_dict(keep_vars=True).items():
            yield name, value, self._mine(name)

    def _mine(self, name: str) -> bool:
        return self._owners[name] == dist.get_rank()

    def _flat(self) -> list[Tensor]:
        """This rank's parts of the fp32 weights, one a parameter group."""
        optimizer = self.engine.optimizer
        return optimizer.fp32_partitioned_groups_flat if self.stage == 3 else optimizer.single_partition_of_fp32_groups

    def _steps(self) -> Tensor:
        return self.engine.optimizer.optimizer.state[self._flat()[0]]["step"]

    def _create_moments(self) -> None:
        """Make AdamW's state before its first step, which would: to restore it, and since DeepSpeed looks for the
        states of all parameter groups after the step of the first one."""
        optimizer = self.engine.optimizer
        for flat in self._flat():
            state = optimizer.optimizer.state[flat]
            state["step"] = torch.zeros((), device=flat.device)
            state |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()

    def _sent(self, whole: Tensor | None, like: Tensor, name: str, group: dist.ProcessGroup) -> Tensor:
        whole = _blank(like) if whole is None else whole
        dist.broadcast(whole, group_src=self._owners[name], group=group)
        return whole.to(self.engine.device)

    @torch.no_grad()
    def _set(self, parameter: Any, whole: Tensor, moment: str | None) -> None:
        """Write this rank's part of a whole weight or moment."""
        from deepspeed.utils import (
            safe_get_local_fp32_param,
            safe_get_local_optimizer_state,
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
        )

        if self.stage < 3:
            if moment:
                safe_set_full_optimizer_state(parameter, whole, moment)
            else:
                safe_set_full_fp32_param(parameter, whole)
                parameter.copy_(whole)
            return
        part: Any = (
            safe_get_local_optimizer_state(parameter, moment) if moment else safe_get_local_fp32_param(parameter)
        )
        start = dist.get_rank() * parameter.partition_numel()
        mine = whole.flatten()[start : start + part.numel()]  # the last part may be padded
        part[: mine.numel()].copy_(mine)
        if moment is None:
            parameter.ds_tensor[: mine.numel()].copy_(mine)


def _blank(like: Any) -> Tensor:
    return torch.zeros(getattr(like, "ds_shape", like.shape), dtype=like.dtype)


def require_deepspeed(kind: str) -> None:
    """Check that DeepSpeed is there.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("deepspeed") is None:
        rule = "DeepSpeed is not installed"
        raise ConfigError("sharding.kind", kind, rule, "pip install 'sundog[deepspeed]', or sharding=fsdp")


def _settings(config: RunConfig, stage: int, parameters: int) -> dict[str, Any]:
    # DeepSpeed allocates a whole bucket, 2 GB unless told, however small the model is.
    bucket = min(parameters, LARGEST_BUCKET)
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket}
    if config.sharding.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.sharding.offload == "all":
        zero["offload_param"] = {"device": "cpu"}
    settings: dict[str, Any] = {
        # Micro batches are the caller's: it weighs its losses and says which backward pass completes the gradients.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.trainer.clip,
        "steps_per_print": sys.maxsize,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # torch's AdamW: DeepSpeed's own are compiled at their first use
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.trainer.precision == "bf16":
        # bf16 products over fp32 weights; no module is listed, so gradients are exchanged in fp32.
        settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return settings


def _load(device: str) -> Callable[..., Any]:
    """Import DeepSpeed (2 s) without what it would build or load for nothing; returns ``deepspeed.initialize``."""
    os.environ.setdefault("LOCAL_RANK", "0")
    if device == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    # It compares optimizers with its own Muon, whose import loads torch's compiler (7 s); a class of that name will do.
    muon = ModuleType("deepspeed.runtime.zero.muon.muon_optimizer")
    muon.__dict__["MuonWithAuxAdam"] = type("MuonWithAuxAdam", (), {})
    sys.modules.setdefault(muon.__name__, muon)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    if device == "cpu":
        __compatible_ops__["deepspeed_shm_comm"] = False  # an inference kernel that every start would compile
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed.initialize


def shard_by_zero(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, device: str) -> ZeroModel:
    """Hand a model that is equal on all ranks, and its optimizer, to DeepSpeed. Collective.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    require_deepspeed(config.sharding.kind)
    stage = int(config.sharding.kind.removeprefix("zero"))
    settings = _settings(config, stage, sum(parameter.numel() for parameter in model.parameters()))
    engine = _load(device)(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    return ZeroModel(engine, stage)

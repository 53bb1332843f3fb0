"""What training does for routers besides gradients: noise keys, capacity, thresholds, biases and their metrics."""

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.schema import RunConfig
from models.decoder import Decoder
from models.moe.router import Observed, Router
from models.moe.upcycle import anneal
from parallel.apply import unwrap
from parallel.mesh import Mesh


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder inside what ``parallelize`` returned."""
    decoder = unwrap(model)
    assert isinstance(decoder, Decoder)
    return decoder


def loss_by_modality(when: str, decoder: Decoder, sums: Tensor) -> dict[str, float]:
    """``{when}/loss_by_modality/<name>`` of a model of several modalities, in nats. Collective.

    ``sums`` [2, modalities] are this rank's sums of losses and numbers of labels; modalities without labels are left
    out. A label's modality is its own, not that of the token that predicts it.
    """
    if sums.shape[1] == 1 or decoder.control.learn_auxiliary:
        return {}
    dist.all_reduce(sums)
    kinds = zip(decoder.spec.modalities, *sums.tolist(), strict=True)
    return {f"{when}/loss_by_modality/{name}": loss / labels for name, loss, labels in kinds if labels > 0}


def freeze_all_but_auxiliary(model: Decoder) -> None:
    """Only auxiliary routers learn, from the choices of a model that stays as it is (MoMa, appendix A.2)."""
    model.control.learn_auxiliary = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".auxiliary." in name)


def before_step(model: nn.Module, step: int, config: RunConfig) -> None:
    """Give the routers the step's noise and, after upcycling, its capacity."""
    decoder = decoder_of(model)
    decoder.control.seed, decoder.control.step = config.seed, step
    if config.trainer.upcycle_steps:
        anneal(decoder, min(1.0, step / config.trainer.upcycle_steps))


def at_window(model: nn.Module, micro_batch: int, rows: int, mesh: Mesh, config: RunConfig) -> None:
    """Tell the routers where in the global batch the next ``rows`` windows of this rank are."""
    share = config.trainer.batch // mesh.dp_size
    decoder_of(model).control.first_window = mesh.dp_rank * share + micro_batch * rows


def after_step(model: nn.Module) -> dict[str, float]:
    """Move thresholds and biases by what all ranks saw in a step, and return the step's metrics. Collective."""
    decoder = decoder_of(model)
    routers = decoder.routers()
    if not routers:
        return {}
    seen = [router.take_observed() for router in routers]
    _reduce(seen)
    for router, one in zip(routers, seen, strict=True):
        router.calibrate(one, decoder.spec.experts.balance_rate)
    values: dict[str, float] = {}
    mixed = [(r, s) for r, s in zip(routers, seen, strict=True) if r.groups == decoder.spec.experts.groups]
    start = 0
    for group, name in enumerate(decoder.spec.expert_groups if mixed else ()):
        stop = start + decoder.spec.experts.groups[group]
        values |= _group_metrics(name, [s.load[start:stop] for _, s in mixed], [s.covered[group] for _, s in mixed])
        start = stop
    if decoder.control.learn_auxiliary:
        values |= _auxiliary_metrics(routers, seen)
    return values


def _reduce(seen: list[Observed]) -> None:
    """Sum over ranks, all numbers of all routers in one message."""
    tensors = [getattr(one, item.name) for one in seen for item in fields(one)]
    packed = torch.cat([x.flatten() for x in tensors])
    dist.all_reduce(packed)
    for tensor, part in zip(tensors, packed.split([x.numel() for x in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def _group_metrics(name: str, loads: list[Tensor], covered: list[Tensor]) -> dict[str, float]:
    """Means over layers: the busiest expert's load over the mean, and the shares of tokens by their experts."""
    busy = [(load.max() / load.mean()).item() for load in loads if load.sum() > 0]
    if not busy:
        return {}  # no tokens of this modality in the step
    shares = torch.stack([counts / counts.sum() for counts in covered if counts.sum() > 0]).mean(0).tolist()
    return {f"moe/load_imbalance/{name}": sum(busy) / len(busy)} | {
        f"moe/tokens_with_{label}/{name}": share for label, share in zip(("0", "1", "2_or_more"), shares, strict=True)
    }


def _auxiliary_metrics(routers: list[Router], seen: list[Observed]) -> dict[str, float]:
    """How the auxiliary routers' guesses compare with what the experts chose."""
    decisions, right, guessed = torch.stack([one.guessed for one in seen]).sum(0).tolist()
    taken = sum(one.load.sum().item() for one in seen)
    return {"moe/auxiliary_accuracy": right / max(decisions, 1.0), "moe/auxiliary_load": guessed / max(taken, 1.0)}

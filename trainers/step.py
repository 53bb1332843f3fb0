"""One optimizer step on the global batch."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.errors import ConfigError
from conf.rules import micro_batch
from conf.schema import RunConfig
from data.loader import IGNORE, Ints
from parallel.batch import shard_batch
from parallel.gradients import no_sync, scale_factor, update
from parallel.mesh import Mesh
from trainers.experts import after_step, at_window, before_step, decoder_of, loss_by_modality
from trainers.optim import set_learning_rate
from trainers.schedule import learning_rate

LocalBatch = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """Equal on every rank: the mean loss over ``labels`` labels in nats, the gradient norm before clipping."""

    loss: float
    grad_norm: float
    lr: float
    labels: int
    parts: dict[str, float]  # metrics of models with experts or of several modalities

    def metrics(self) -> dict[str, float]:
        """As they are recorded."""
        return {"train/loss": self.loss, "optim/lr": self.lr, "optim/grad_norm": self.grad_norm} | self.parts


def to_local(arrays: dict[str, Ints], mesh: Mesh, layout: str, device: torch.device) -> LocalBatch:
    """Return this rank's part, [rows, context / cp] each, of its data-parallel rank's ``Batch.arrays()``."""
    tensors = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return shard_batch(tensors, mesh, layout)


def micro_batches(batch: LocalBatch, rows: int) -> Iterator[LocalBatch]:
    """Cut a local batch into parts of at most ``rows`` windows."""
    for start in range(0, batch["tokens"].shape[0], rows):
        yield {name: tensor[start : start + rows] for name, tensor in batch.items()}


def precision(config: RunConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the autocast context of forward passes: bf16 products over fp32 weights under ddp.

    Under FSDP2 the mixed-precision policy of ``parallel.apply`` casts instead, once a gathered parameter; DeepSpeed's
    engine enters an autocast of its own.
    """
    if config.trainer.precision == "bf16" and config.sharding.kind == "ddp":
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


def forward_loss(model: nn.Module, batch: LocalBatch, config: RunConfig) -> Tensor:
    """Return the sum of the token losses of a local micro batch, a scalar in fp32."""
    document_ids = batch["document_ids"] if config.data.attention != "context" else None
    with precision(config, batch["tokens"].device):
        loss, _ = model(batch["tokens"], batch["positions"], document_ids, labels=batch["labels"])
    return loss


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: LocalBatch, step: int, mesh: Mesh, config: RunConfig
) -> StepResult:
    """Do the optimizer step with 0-based index ``step`` on this rank's part of the global batch. Collective.

    The loss is the mean over all labels of the global batch: of all ranks and all micro batches. The labels are
    counted first, so that every micro batch's gradient already has its final weight and accumulation equals one big
    batch.

    Raises:
        ConfigError: the gradient is not finite (on all ranks; the weights did not change), or the loss is not.
    """
    count = (batch["labels"] != IGNORE).sum()
    dist.all_reduce(count)
    labels = max(int(count.item()), 1)

    parts = list(micro_batches(batch, micro_batch(config)))
    before_step(model, step, config)
    loss_sum = torch.zeros((), dtype=torch.float32, device=count.device)
    decoder = decoder_of(model)
    by_modality = torch.zeros(2, len(decoder.spec.modalities), dtype=torch.float64, device=count.device)
    for index, part in enumerate(parts):
        at_window(model, index, micro_batch(config), mesh, config)
        with no_sync(model, enabled=index < len(parts) - 1):
            part_loss = forward_loss(model, part, config)
            (part_loss * (scale_factor(mesh) / labels)).backward()
        loss_sum += part_loss.detach()
        if decoder.seen is not None:
            by_modality += decoder.seen
    dist.all_reduce(loss_sum)

    rate = learning_rate(step, config.trainer)
    set_learning_rate(optimizer, rate)
    grad_norm = update(model, optimizer, config.trainer.clip or math.inf, mesh)
    parts_of_it = after_step(model) | loss_by_modality("train", decoder, by_modality)
    result = StepResult(float(loss_sum) / labels, float(grad_norm), rate, labels, parts_of_it)
    if not (math.isfinite(result.loss) and math.isfinite(result.grad_norm)):
        raise ConfigError(
            "trainer.lr",
            config.trainer.lr,
            f"loss and gradient must stay finite; step {step + 1} has loss {result.loss} and norm {result.grad_norm}",
            "a lower trainer.lr, more trainer.warmup_steps or a smaller trainer.clip; earlier checkpoints are intact",
        )
    return result

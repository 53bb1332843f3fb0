"""Loss on held-out windows: over all, by context and modality, and what choosing experts without the future costs."""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from conf.rules import micro_batch
from conf.schema import RunConfig
from data.loader import IGNORE, Loader
from parallel.mesh import Mesh
from trainers.experts import decoder_of, loss_by_modality
from trainers.metrics import bucket_name, position_buckets
from trainers.step import precision, to_local


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, mesh: Mesh, config: RunConfig, device: torch.device) -> dict[str, float]:
    """Return ``eval/loss``, ``eval/loss_by_position/<bucket>`` and, for models of several modalities,
    ``eval/loss_by_modality/<name>`` in nats; for experts that choose, :func:`causal_gap`. Collective, deterministic.

    A label's position is that of the token that predicts it, counted as the model counts: from the start of the
    window, or of the document with ``data.attention=document``. Empty buckets are left out.
    """
    buckets = position_buckets(config.data.context)
    edges = torch.tensor([end for _, end in buckets], device=device)
    sums = torch.zeros(2, len(buckets), dtype=torch.float64, device=device)  # losses, labels
    decoder = decoder_of(model)
    by_modality = torch.zeros(2, len(decoder.spec.modalities), dtype=torch.float64, device=device)
    windows = min(config.trainer.eval_windows, loader.eval_windows)
    model.eval()
    for first in range(0, windows, mesh.dp_size):
        # One window a rank and call. Ranks that share parameters make the same calls: past the end, without labels.
        rows = loader.eval_batch(first // mesh.dp_size, mesh.dp_size).arrays()
        row = {name: array[mesh.dp_rank : mesh.dp_rank + 1] for name, array in rows.items()}
        if first + mesh.dp_rank >= windows:
            row["labels"] = np.full_like(row["labels"], IGNORE)
        batch = to_local(row, mesh, config.sequence.layout, device)
        document_ids = batch["document_ids"] if config.data.attention != "context" else None
        with precision(config, device):
            logits_BSV = model(batch["tokens"], batch["positions"], document_ids)
        losses = F.cross_entropy(logits_BSV.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none")
        known = batch["labels"].flatten() != IGNORE
        bucket = torch.bucketize(batch["positions"].flatten()[known], edges, right=True)
        sums[0].index_add_(0, bucket, losses[known].double())
        sums[1].index_add_(0, bucket, torch.ones_like(losses[known], dtype=torch.float64))
        modality = decoder.modality_of(batch["labels"].flatten()[known])
        by_modality[0].index_add_(0, modality, losses[known].double())
        by_modality[1].index_add_(0, modality, torch.ones_like(losses[known], dtype=torch.float64))
    dist.all_reduce(sums)
    total, count = sums.sum(dim=1).tolist()
    values = {"eval/loss": total / max(count, 1.0)}
    for (start, end), loss, labels in zip(buckets, *sums.tolist(), strict=True):
        if labels > 0:
            values[bucket_name(start, end)] = loss / labels
    values |= loss_by_modality("eval", decoder, by_modality)
    if any(router.routing == "expert_choice" for router in decoder.routers()):
        values |= causal_gap(model, loader, mesh, config, device)
    model.train()
    return values


@torch.no_grad()
def causal_gap(
    model: nn.Module, loader: Loader, mesh: Mesh, config: RunConfig, device: torch.device
) -> dict[str, float]:
    """Return the held-out loss with experts that choose among all tokens of a pool, as in training, and how much higher
    it is where they see no later token. Both on the same windows, of which a pool has as many as in training."""
    control = decoder_of(model).control
    windows = min(config.trainer.eval_windows, loader.eval_windows)
    rows = max(1, min(micro_batch(config), windows // mesh.dp_size))
    losses = {}
    for way in ("experts", ""):
        control.way = way
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for index in range(max(1, windows // (rows * mesh.dp_size))):
            arrays = loader.eval_batch(index, rows * mesh.dp_size).arrays()
            mine = {name: array[mesh.dp_rank * rows : (mesh.dp_rank + 1) * rows] for name, array in arrays.items()}
            control.first_window = mesh.dp_rank * rows
            batch = to_local(mine, mesh, config.sequence.layout, device)
            document_ids = batch["document_ids"] if config.data.attention != "context" else None
            with precision(config, device):
                logits_BSV = model(batch["tokens"], batch["positions"], document_ids)
            labels = batch["labels"].flatten()
            sums[0] += F.cross_entropy(logits_BSV.flatten(0, 1).float(), labels, ignore_index=IGNORE, reduction="sum")
            sums[1] += (labels != IGNORE).sum()
        dist.all_reduce(sums)
        losses[way] = (sums[0] / sums[1].clamp_min(1)).item()
    return {"eval/loss_expert_choice": losses["experts"], "moe/causal_gap": losses[""] - losses["experts"]}

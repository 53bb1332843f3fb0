"""Loss on held-out windows, and how it falls with the context that a token has."""

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from conf.schema import RunConfig
from data.loader import IGNORE, Loader
from parallel.mesh import Mesh
from trainers.metrics import bucket_name, position_buckets
from trainers.step import precision, to_local


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, mesh: Mesh, config: RunConfig, device: torch.device) -> dict[str, float]:
    """Return ``eval/loss`` and ``eval/loss_by_position/<bucket>`` in nats. Collective, deterministic.

    A label's position is that of the token that predicts it, counted as the model counts: from the start of the
    window, or of the document with ``data.attention=document``. Empty buckets are left out.
    """
    buckets = position_buckets(config.data.context)
    edges = torch.tensor([end for _, end in buckets], device=device)
    sums = torch.zeros(2, len(buckets), dtype=torch.float64, device=device)  # losses, labels
    windows = min(config.trainer.eval_windows, loader.eval_windows)
    model.eval()
    for first in range(0, windows, mesh.dp_size):
        # One window a rank and call. Ranks that share parameters make the same calls: past the end, without labels.
        rows = loader.eval_batch(first // mesh.dp_size, mesh.dp_size).arrays()
        row = {name: array[mesh.dp_rank : mesh.dp_rank + 1] for name, array in rows.items()}
        if first + mesh.dp_rank >= windows:
            row["labels"] = np.full_like(row["labels"], IGNORE)
        batch = to_local(row, mesh, config.sequence.layout, device)
        document_ids = batch["document_ids"] if config.data.attention == "document" else None
        with precision(config, device):
            logits_BSV = model(batch["tokens"], batch["positions"], document_ids)
        losses = F.cross_entropy(logits_BSV.flatten(0, 1).float(), batch["labels"].flatten(), reduction="none")
        known = batch["labels"].flatten() != IGNORE
        bucket = torch.bucketize(batch["positions"].flatten()[known], edges, right=True)
        sums[0].index_add_(0, bucket, losses[known].double())
        sums[1].index_add_(0, bucket, torch.ones_like(losses[known], dtype=torch.float64))
    model.train()
    dist.all_reduce(sums)
    total, count = sums.sum(dim=1).tolist()
    values = {"eval/loss": total / max(count, 1.0)}
    for (start, end), loss, labels in zip(buckets, *sums.tolist(), strict=True):
        if labels > 0:
            values[bucket_name(start, end)] = loss / labels
    return values

"""Short continuations of held-out text, so that a person sees what the numbers mean."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conf.schema import RunConfig
from data.loader import Loader
from parallel.batch import shard_batch
from parallel.mesh import Mesh
from trainers.step import precision

WINDOWS, PROMPT, NEW = 2, 32, 32  # texts; tokens of a prompt and of its continuation


def _length(context: int, cp: int) -> int:
    """Tokens of the sequence that is worked on: a length that every layout can split."""
    unit = 2 * cp
    return min(-(-(PROMPT + NEW) // unit) * unit, context)


@torch.no_grad()
def continue_held_out(
    model: nn.Module, loader: Loader, mesh: Mesh, config: RunConfig, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Continue the beginnings of a few held-out windows greedily.

    Collective: the sequence stays split as in training, and every new token takes a forward pass over all of it (a
    short one). Returns the prompts and the continuations, token ids on the CPU, equal on every rank.
    """
    length = _length(config.data.context, mesh.cp_size)
    prompt = min(PROMPT, length // 2)
    windows = min(WINDOWS, loader.eval_windows)
    whole = torch.from_numpy(loader.eval_batch(0, windows).tokens)[:, :length].to(device).clone()
    whole[:, prompt:] = 0
    positions = torch.arange(length, device=device).expand(windows, length).contiguous()
    model.eval()
    for end in range(prompt, length):
        parts = {"tokens": whole, "positions": positions, "labels": whole, "document_ids": torch.zeros_like(whole)}
        local = shard_batch(parts, mesh, config.sequence.layout)
        with precision(config, device):
            logits_BSV = model(local["tokens"], local["positions"], None)
        last = local["positions"] == end - 1  # held by one rank of the sequence-parallel axis
        chosen = torch.where(last, logits_BSV.argmax(dim=-1), -1).amax(dim=1)
        dist.all_reduce(chosen, op=dist.ReduceOp.MAX)
        whole[:, end] = chosen
    model.train()
    return whole[:, :prompt].cpu(), whole[:, prompt:].cpu()

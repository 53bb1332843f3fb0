"""A check that all ranks make the same call, so that a mismatch is an error with both sides instead of a hang."""

import hashlib
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from conf.errors import ConfigError

_agreed: WeakKeyDictionary[dist.ProcessGroup, set[int]] = WeakKeyDictionary()


def _digest(value: object) -> int:
    return int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")


def check_agreement(group: dist.ProcessGroup, device: torch.device, call: dict[str, object]) -> None:
    """Compare a call's description over the ranks, the first time that this rank makes a call so described.

    Raises:
        ConfigError: on every rank, when the descriptions differ; it names the first part that does and the ranks.
    """
    agreed = _agreed.setdefault(group, set())
    whole = _digest(call)
    if whole in agreed:
        return
    mine = torch.tensor([_digest(part) for part in call.values()], dtype=torch.int64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, mine, group=group)
    for index, (name, part) in enumerate(call.items()):
        others = [rank for rank, theirs in enumerate(everyone) if theirs[index].item() != mine[index].item()]
        if others:
            raise ConfigError(
                name,
                part,
                f"all ranks of the group pass the same; ranks {others} pass another than this one",
                "give every rank a shard of the same shape and dtype, and the same arguments",
            )
    agreed.add(whole)

"""A check that all ranks make the same call, so that a mismatch is an error with both sides instead of a hang."""

import hashlib
from datetime import timedelta
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from conf.errors import ConfigError
from parallel.ring.failure import lost_rank

_agreed: WeakKeyDictionary[dist.ProcessGroup, set[tuple[tuple[str, str], ...]]] = WeakKeyDictionary()


@lru_cache(maxsize=1024)
def _digests(call: tuple[tuple[str, str], ...]) -> Tensor:
    words = [hashlib.sha256(part.encode()).digest()[:7] for _, part in call]
    return torch.tensor([int.from_bytes(word, "big") for word in words], dtype=torch.int64)


def check_agreement(
    group: dist.ProcessGroup, device: torch.device, call: tuple[tuple[str, str], ...], timeout: float
) -> None:
    """Compare a call's description, ``(name, value)`` pairs, over the ranks.

    On a CPU this is a small message before every call, so a rank whose call changes later is found too. On a GPU it
    would stop the stream, so there only descriptions that are new to this rank are compared.

    Raises:
        ConfigError: on every rank, when the descriptions differ; it names the first part that does and the ranks.
        RankLost: a rank does not answer.
    """
    agreed = _agreed.setdefault(group, set())
    if device.type != "cpu" and call in agreed:
        return
    mine = _digests(call).to(device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    try:
        work = dist.all_gather(gathered, mine, group=group, async_op=True)
        assert work is not None, "only a rank outside of the group has no work"
        work.wait(timedelta(seconds=timeout))
    except RuntimeError as error:
        raise lost_rank(group, -1, timeout) from error
    everyone = torch.stack(gathered)
    if torch.equal(everyone, mine.expand_as(everyone)):
        agreed.add(call)
        return
    differing = (everyone != mine).tolist()
    for index, (name, part) in enumerate(call):
        others = [rank for rank, theirs in enumerate(differing) if theirs[index]]
        if others:
            raise ConfigError(
                name,
                part,
                f"all ranks of the group pass the same; ranks {others} pass another than this one",
                "give every rank a shard of the same sort, and the same arguments",
            )

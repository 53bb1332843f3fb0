"""Which rank is to blame when a message does not come.

A rank that waits in vain knows only whom it waits for, and that one may itself be waiting. So each rank that gives up
notes in the group's store for whom it waited; following these notes leads to a rank that left none.
"""

import time

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from conf.errors import RankLost

_GRACE_SEC = 1.5  # ranks give up at about the same time: how long to wait for another's note
_POLL_SEC = 0.05


def _note(store: Store, rank: int) -> int | None:
    """For whom that rank has waited in vain; None if it has not said so in time."""
    deadline = time.monotonic() + _GRACE_SEC
    key = f"sequence_parallel/waited/{rank}"
    while not store.check([key]):
        if time.monotonic() > deadline:
            return None
        time.sleep(_POLL_SEC)
    return int(store.get(key))


def lost_rank(group: dist.ProcessGroup, peer: int, timeout: float) -> RankLost:
    """The error for a wait on ``peer`` (-1: on some rank) that failed; it names the rank at the end of the chain.

    The group cannot be used any more.
    """
    mine, size = dist.get_rank(group), dist.get_world_size(group)
    culprits = {peer}
    try:
        store = group.get_group_store()
        store.set(f"sequence_parallel/waited/{mine}", str(peer))
        if peer < 0:
            culprits = {rank for rank in range(size) if rank != mine and _note(store, rank) is None}
        seen = {mine}
        while peer >= 0 and peer not in seen:
            seen.add(peer)
            following = _note(store, peer)
            culprits = {peer}
            peer = -1 if following is None else following
    except RuntimeError:
        pass  # the store has gone with the rank that kept it
    names = ", ".join(str(dist.get_global_rank(group, rank)) for rank in sorted(culprits) if rank >= 0)
    return RankLost(
        "sequence parallelism",
        f"rank {names or 'unknown'} is lost",
        f"every rank answers within {timeout:g} s; rank {dist.get_global_rank(group, mine)} waited in vain",
        "look at that rank's last lines: it has ended, is stuck or runs out of memory",
    )

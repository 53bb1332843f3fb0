"""Point-to-point messages of one attention call over a process group.

The receives of an exchange are always posted before its sends. gloo needs that: a pair of ranks has one transmit
queue, and a "ready to receive" note that queues behind a large payload makes the two directions take turns.
"""

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.ring.failure import lost_rank

Parcels = Sequence[tuple[int, Tensor]]  # (group rank of the other end, tensor that is contiguous in memory)


class Arrival(Protocol):
    """A posted receive."""

    def wait(self) -> Tensor:
        """The tensor, once it is here."""
        ...


class Channel(Protocol):
    """Messages between two ranks arrive in the order in which they were sent; there are no tags, as NCCL has none.

    ``early``: receives may be posted before the exchange that they belong to.
    """

    @property
    def early(self) -> bool: ...

    def receive(self, peer: int, tensors: Sequence[Tensor]) -> list[Arrival]:
        """Start to receive into the given tensors."""
        ...

    def send(self, parcels: Parcels) -> None:
        """Start to send one lot, which may be empty; the tensors are kept alive until :meth:`finish_sends`."""
        ...

    def finish_sends(self, keep: int = 0) -> None:
        """Wait until all lots but the last ``keep`` have left, then let go of them."""
        ...


class _GroupArrival:
    def __init__(self, channel: "GroupChannel", peer: int, tensor: Tensor) -> None:
        self._channel, self.peer, self.tensor = channel, peer, tensor
        self.work: Any = None

    def wait(self) -> Tensor:
        assert self.work is not None, "receives are posted together with the sends of their exchange"
        self._channel.complete(self.work, self.peer)
        return self.tensor


class GroupChannel:
    """A channel over a process group; waits longer than ``timeout`` seconds end in an error that names a rank."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> None:
        self._group, self._timeout = group, timeout
        # NCCL runs single operations one after the other on one stream, so that two ranks could wait for each other:
        # there the receives and sends of an exchange are posted as one group. gloo, on CPUs, works on all at once.
        self._grouped = device.type != "cpu"
        self.early = not self._grouped  # on a stream a receive would hold up the sends behind it
        self._unposted: list[_GroupArrival] = []
        self._sent: deque[list[tuple[Any, int, list[Tensor]]]] = deque()

    def complete(self, work: Any, peer: int) -> None:
        try:
            if self._grouped:
                work.wait()  # on a GPU this only orders streams; the group's own watchdog keeps the time
            else:
                work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            raise lost_rank(self._group, peer, self._timeout) from error

    def receive(self, peer: int, tensors: Sequence[Tensor]) -> list[Arrival]:
        arrivals = [_GroupArrival(self, peer, tensor) for tensor in tensors]
        if self._grouped:
            self._unposted += arrivals
        else:
            for arrival in arrivals:
                arrival.work = self._post(dist.irecv, arrival.tensor, group_src=peer)
        return list(arrivals)

    def _post(self, operation: Any, tensor: Tensor, **peer: int) -> Any:
        try:
            return operation(tensor, group=self._group, **peer)
        except RuntimeError as error:  # the connection is gone already
            raise lost_rank(self._group, next(iter(peer.values())), self._timeout) from error

    def send(self, parcels: Parcels) -> None:
        if not self._grouped:
            self._sent.append([(self._post(dist.isend, x, group_dst=peer), peer, [x]) for peer, x in parcels])
            return
        posts = [dist.P2POp(dist.irecv, a.tensor, group=self._group, group_peer=a.peer) for a in self._unposted]
        posts += [dist.P2POp(dist.isend, x, group=self._group, group_peer=peer) for peer, x in parcels]
        works: list[Any] = dist.batch_isend_irecv(posts) if posts else []
        for index, arrival in enumerate(self._unposted):
            arrival.work = works[index if len(works) == len(posts) else 0]
        self._sent.append([(work, -1, [x for _, x in parcels]) for work in works])
        self._unposted.clear()

    def finish_sends(self, keep: int = 0) -> None:
        while len(self._sent) > keep:
            for work, peer, _ in self._sent.popleft():
                self.complete(work, peer)

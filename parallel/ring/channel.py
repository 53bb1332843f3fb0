"""Point-to-point messages of one attention call over a process group.

The receives of a step are always posted before its sends. gloo needs that: a pair of ranks has one transmit queue, and
a "ready to receive" note that queues behind a large payload makes the two directions take turns.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Parcels = Sequence[tuple[int, Tensor]]  # (group rank of the other end, tensor that is contiguous in memory)


class Arrival:
    """A posted receive."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.work: Any = None

    def wait(self) -> Tensor:
        assert self.work is not None, "receives are posted together with the sends of their step"
        self.work.wait()
        return self.tensor


class Channel:
    """Messages between two ranks arrive in the order in which they were sent; there are no tags, as NCCL has none."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group = group
        # NCCL runs single operations one after the other on one stream, so that two ranks could wait for each other:
        # there a step's receives and sends are posted as one group. gloo, on CPUs, works on all of them at once.
        self._grouped = device.type != "cpu"
        self._unposted: list[tuple[int, Arrival]] = []
        self._sent: list[tuple[Any, list[Tensor]]] = []

    def receive(self, parcels: Parcels) -> list[Arrival]:
        """Start to receive into the given tensors."""
        arrivals = [Arrival(tensor) for _, tensor in parcels]
        for (peer, tensor), arrival in zip(parcels, arrivals, strict=True):
            if self._grouped:
                self._unposted.append((peer, arrival))
            else:
                arrival.work = dist.irecv(tensor, group=self._group, group_src=peer)
        return arrivals

    def send(self, parcels: Parcels) -> None:
        """Start to send; the tensors are kept alive until :meth:`finish_sends`."""
        if not self._grouped:
            self._sent += [(dist.isend(x, group=self._group, group_dst=peer), [x]) for peer, x in parcels]
            return
        posts = [dist.P2POp(dist.irecv, a.tensor, group=self._group, group_peer=p) for p, a in self._unposted]
        posts += [dist.P2POp(dist.isend, x, group=self._group, group_peer=peer) for peer, x in parcels]
        if not posts:
            return
        works: list[Any] = dist.batch_isend_irecv(posts)
        for index, (_, arrival) in enumerate(self._unposted):
            arrival.work = works[index if len(works) == len(posts) else 0]
        self._sent += [(work, [x for _, x in parcels]) for work in works]
        self._unposted.clear()

    def finish_sends(self) -> None:
        """Wait until what was sent has left, then let go of it."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

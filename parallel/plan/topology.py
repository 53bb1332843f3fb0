"""The links between the ranks that share a sequence: which of them a message takes, and how fast they are.

- ``port``: every rank has one full-duplex port to a switch; what it sends shares the way out, what it receives the way
  in, whatever the direction on the ring of ranks.
- ``ring``: a full-duplex link to each neighbour; a message to another rank takes every link on the shorter way.
- ``mesh``: a full-duplex link between every two ranks.
- ``two_level``: islands of ranks with fast ports to a switch of their own, and a slower port of each rank to the
  fabric between islands.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from conf.errors import ConfigError
from conf.rules import nearest

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Kind = Literal["port", "ring", "mesh", "two_level"]
TOPOLOGIES: tuple[Kind, ...] = ("port", "ring", "mesh", "two_level")


class Speed(NamedTuple):
    """Of a link in one direction."""

    bandwidth: float  # bytes/s
    latency: float = 0.0  # seconds a message, from its posting at both ends


@dataclass(frozen=True)
class Topology:
    """``size`` ranks joined by links. Every directed link has a number; :meth:`name` says which it is."""

    kind: Kind
    size: int
    speed: Speed
    island: int = 0  # ranks of one island (two_level)
    fabric: Speed | None = None  # between islands (two_level)
    injection: float = np.inf  # bytes/s of one rank over all its links together, each way (ring, mesh)
    post: float = 0.0  # seconds of a rank's host for every tensor that it sends or receives
    buffer: float = 0.0  # bytes of a message that its sender is rid of before they have travelled
    crowding: float = 1.0  # how much longer messages of one exchange that share a link take than their bytes
    turn: float = 0.0  # seconds that computing loses by an exchange in which a rank takes part, ranks sharing cores
    copy: float = 0.0  # seconds that it loses by a byte that a rank sends or receives

    def __post_init__(self) -> None:
        if self.kind not in TOPOLOGIES:
            raise ConfigError("topology", self.kind, f"one of {', '.join(TOPOLOGIES)}", nearest(self.kind, TOPOLOGIES))
        if min(self.speed.bandwidth, self.fabric.bandwidth if self.fabric else 1.0) <= 0:
            raise ConfigError(
                "topology", self.speed.bandwidth, "a bandwidth above 0 bytes/s", "measure it, or state it"
            )
        if self.kind == "two_level" and (self.fabric is None or self.island < 1 or self.size % self.island):
            raise ConfigError(
                "topology",
                f"two_level of {self.size} ranks in islands of {self.island}",
                "islands of equal size and the speed of the fabric between them",
                "an island size that divides the number of ranks",
            )

    @cached_property
    def bandwidth(self) -> Floats:
        """Bytes/s of each directed link, then what limits all of a rank's links together, its way out and its way in,
        and a last one that no message waits for (padding of paths)."""
        speeds = np.full(self.links, self.speed.bandwidth)
        if self.fabric is not None:
            speeds[2 * self.size :] = self.fabric.bandwidth
        limits = 2 * self.size if np.isfinite(self.injection) else 0
        return np.concatenate([speeds, np.full(limits, self.injection), [np.inf]])

    @property
    def links(self) -> int:
        """How many directed links there are; :attr:`bandwidth` has more entries."""
        return {"port": 2, "ring": 2, "mesh": self.size, "two_level": 4}[self.kind] * self.size

    def latency(self, source: Ints, target: Ints) -> Floats:
        """Seconds before the first byte of each message arrives."""
        if self.kind == "two_level" and self.fabric is not None:
            inside = source // self.island == target // self.island
            return np.where(inside, self.speed.latency, self.fabric.latency)
        if self.kind == "ring":
            return self.speed.latency * self._hops(source, target).astype(np.float64)
        return np.full(source.shape, self.speed.latency)

    def _hops(self, source: Ints, target: Ints) -> Ints:
        onward = (target - source) % self.size
        return np.minimum(onward, self.size - onward)

    def paths(self, source: Ints, target: Ints) -> Ints:
        """Numbers of the links that each message takes, ``[messages, longest path]``, padded with the last link."""
        links = self._between(source, target)
        if not np.isfinite(self.injection):
            return links
        return np.column_stack([links, self.links + source, self.links + self.size + target])

    def _between(self, source: Ints, target: Ints) -> Ints:
        n, pad = self.size, len(self.bandwidth) - 1
        if self.kind == "mesh":
            return (source * n + target)[:, None]
        if self.kind == "ring":
            onward = (target - source) % n
            step = np.arange(max(1, n // 2))
            forward = onward[:, None] <= n // 2  # the antipode is reached going up, as the routes of a real ring are
            links = np.where(forward, (source[:, None] + step) % n, n + (source[:, None] - step) % n)
            return np.where(step < self._hops(source, target)[:, None], links, pad)
        ports = np.stack([source, n + target], axis=1)
        if self.kind == "port":
            return ports
        inside = source // self.island == target // self.island
        return np.where(inside[:, None], ports, ports + 2 * n)

    def name(self, link: int) -> str:
        """``out 3``, ``3 > 4``, ``fabric in 3``: a directed link for people."""
        n = self.size
        if link >= self.links:
            return f"all {'in' if link >= self.links + n else 'out'} {(link - self.links) % n}"
        if self.kind == "mesh":
            return f"{link // n} > {link % n}"
        if self.kind == "ring":
            return f"{link} > {(link + 1) % n}" if link < n else f"{link - n} > {(link - 1) % n}"
        where = "fabric " if link >= 2 * n else ""
        return f"{where}{'in' if link // n % 2 else 'out'} {link % n}"

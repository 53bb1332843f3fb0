"""Networks of a set bandwidth between the ranks of one machine: network namespaces, veth pairs and ``tc tbf`` (root).

A namespace is held by a file descriptor of this process and has no name, so nothing is left when the process ends, in
whatever way. Every rank has the address ``10.78.0.<rank + 1>`` on an interface of its own; its links are

- ``port``: one, to a switch: all that a rank sends shares its way out, all that it receives shares its way in;
- ``ring``: one to each neighbour; what is for others is forwarded by the ranks between, on the shorter way round;
- ``mesh``: one to every other rank.

A link carries the set rate in each direction at once.
"""

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

TOPOLOGIES = ("port", "ring", "mesh")
HEADER_BYTES = 66  # of a packet as the interface counts it: Ethernet 14, IPv4 20, TCP 32 with time stamps
_MTU = 9000  # few packets and few headers
_QUEUE = "burst 20kb limit 8mb"  # of the shaper: above one packet; deep enough that nothing is dropped
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _checked(status: int, what: str) -> None:
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def enter(path: str) -> None:
    """Move the calling thread, and what it starts from now on, into a namespace."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _checked(_libc.setns(descriptor, _CLONE_NEWNET), "setns")
    finally:
        os.close(descriptor)


class Namespace:
    """A new network namespace, alive as long as this object or a process inside."""

    def __init__(self) -> None:
        self._error: OSError | None = None
        maker = threading.Thread(target=self._make)  # namespaces belong to threads: this one stays where it is
        maker.start()
        maker.join()
        if self._error is not None:
            raise self._error
        self.path = f"/proc/{os.getpid()}/fd/{self._descriptor}"

    def _make(self) -> None:
        try:
            _checked(_libc.unshare(_CLONE_NEWNET), "unshare")
            self._descriptor = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        except OSError as error:
            self._error = error

    def _batch(self, tool: str, lines: Sequence[str]) -> None:
        done = subprocess.run(
            [tool, "-batch", "-"],
            input="\n".join(lines),
            text=True,
            capture_output=True,
            preexec_fn=lambda: enter(self.path),
        )
        if done.returncode != 0:
            raise OSError(f"{tool} failed: {done.stderr.strip()}\n" + "\n".join(lines))

    def ip(self, *lines: str) -> None:
        self._batch("ip", lines)

    def shape(self, interface: str, rate: str) -> None:
        self.ip(f"link set {interface} mtu {_MTU} gso_max_segs 1 up")
        self._batch("tc", [f"qdisc add dev {interface} root tbf rate {rate} {_QUEUE}"])

    def forward(self) -> None:
        """Pass packets on, also those whose way back is another; let a connection that was idle, as one that waits for
        a block's compute is, go on at the speed it had; and let no host's choice of congestion control decide. Nothing
        is lost on these links, so Reno keeps them full; BBR, which guesses each connection's share, leaves gaps."""
        settings = {
            "ip_forward": "1",
            "conf/all/rp_filter": "0",
            "conf/default/rp_filter": "0",
            "tcp_slow_start_after_idle": "0",
            "tcp_congestion_control": "reno",
        }

        def write() -> None:
            enter(self.path)
            for name, value in settings.items():
                Path("/proc/sys/net/ipv4", name).write_text(value)

        writer = threading.Thread(target=write)
        writer.start()
        writer.join()

    def reshape(self, interface: str, rate: str) -> None:
        self._batch("tc", [f"qdisc change dev {interface} root tbf rate {rate} {_QUEUE}"])

    def close(self) -> None:
        os.close(self._descriptor)


def available() -> str:
    """Why shaped networks cannot be made here; empty if they can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 not found"
    try:
        Namespace().close()
    except OSError as error:
        return f"no privilege to make network namespaces ({error.strerror})"
    return ""


def address(rank: int) -> str:
    return f"10.78.0.{rank + 1}"


@dataclass(frozen=True)
class Seat:
    """Where a rank runs; picklable. Called in the rank's process before it connects."""

    paths: tuple[str, ...]

    def __call__(self, rank: int) -> None:
        enter(self.paths[rank])
        os.environ["GLOO_SOCKET_IFNAME"] = "fab0"


class Network:
    """Namespaces of all ranks, joined as ``topology`` with links of ``mbit`` Mbit/s each way; a context manager."""

    def __init__(self, topology: str, ranks: int, mbit: float) -> None:
        self._rate = f"{round(mbit * 1000)}kbit"
        self._ranks = [Namespace() for _ in range(ranks)]
        self._others: list[Namespace] = []
        join: dict[str, Callable[[], None]] = {"port": self._port, "ring": self._ring, "mesh": self._mesh}
        for namespace in self._ranks:
            namespace.ip("link set lo up")
            namespace.forward()
        join[topology]()

    @property
    def seat(self) -> Seat:
        return Seat(tuple(namespace.path for namespace in self._ranks))

    def cut(self, rank: int) -> None:
        """Take a rank's one link down (``port``); what is sent to it or by it is lost."""
        self._others[0].ip(f"link set e{rank} down")

    def mend(self, rank: int) -> None:
        """Bring a rank's link up again, at its rate."""
        self._others[0].ip(f"link set e{rank} up")
        self.slow(rank, self._rate)

    def slow(self, rank: int, rate: str) -> None:
        """Set the rate of a rank's one link (``port``), both ways."""
        self._others[0].reshape(f"e{rank}", rate)
        self._ranks[rank].reshape("fab0", rate)

    def _fabric(self) -> None:
        """The address that all of a rank's links share, on a bridge without ports: an interface that leads nowhere."""
        for rank, namespace in enumerate(self._ranks):
            namespace.ip("link add fab0 type bridge", f"addr add {address(rank)}/32 dev fab0", "link set fab0 up")

    def _link(self, one: int, one_name: str, two: int, two_name: str) -> None:
        here, there = self._ranks[one], self._ranks[two]
        here.ip(f"link add {one_name} type veth peer name {two_name} netns {there.path}")
        here.shape(one_name, self._rate)
        there.shape(two_name, self._rate)

    def _route(self, rank: int, target: int, interface: str, via: int) -> None:
        gateway = "scope link" if via == target else f"via {address(via)} onlink"
        self._ranks[rank].ip(f"route add {address(target)}/32 dev {interface} src {address(rank)} {gateway}")

    def _port(self) -> None:
        switch = Namespace()
        self._others.append(switch)
        switch.ip("link add br0 type bridge", f"link set br0 mtu {_MTU} up")
        for rank, namespace in enumerate(self._ranks):
            namespace.ip(f"link add fab0 type veth peer name e{rank} netns {switch.path}")
            namespace.ip(f"addr add {address(rank)}/24 dev fab0")
            namespace.shape("fab0", self._rate)
            switch.shape(f"e{rank}", self._rate)
            switch.ip(f"link set e{rank} master br0")

    def _ring(self) -> None:
        self._fabric()
        size = len(self._ranks)
        for rank in range(size if size > 2 else size - 1):
            self._link(rank, "next", (rank + 1) % size, "prev")
        for rank in range(size):
            # Neighbours first: the ways to the others lead through them.
            for target in sorted(
                set(range(size)) - {rank}, key=lambda other: min((other - rank) % size, (rank - other) % size)
            ):
                onward = (target - rank) % size <= size // 2 and not (size == 2 and rank == 1)
                via = (rank + 1) % size if onward else (rank - 1) % size
                self._route(rank, target, "next" if onward else "prev", via)

    def _mesh(self) -> None:
        self._fabric()
        size = len(self._ranks)
        for one in range(size):
            for two in range(one + 1, size):
                self._link(one, f"to{two}", two, f"to{one}")
                self._route(one, two, f"to{two}", two)
                self._route(two, one, f"to{one}", one)

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *_: object) -> None:
        for namespace in (*self._ranks, *self._others):
            namespace.close()


@dataclass(frozen=True)
class Sent:
    """What one interface has sent."""

    packets: int
    size: int  # bytes, headers included

    @property
    def payload(self) -> int:
        return self.size - HEADER_BYTES * self.packets


def sent() -> dict[str, Sent]:
    """Counters of this process's interfaces by name; together the ranks' interfaces are all directed links."""
    found: dict[str, Sent] = {}
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]:
        name, _, numbers = line.partition(":")
        fields = numbers.split()
        found[name.strip()] = Sent(packets=int(fields[9]), size=int(fields[8]))
    return found

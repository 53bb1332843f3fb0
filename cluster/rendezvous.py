"""Who is which rank, and the environment variables from which torch.distributed finds the other ranks."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Seat:
    """One actor of a gang: where it is, before it becomes a rank."""

    index: int  # of its bundle
    ip: str
    host: str
    pid: int
    gpus: tuple[str, ...] = ()
    node: str = ""  # Ray's id of its machine

    @property
    def order(self) -> tuple[int, int, tuple[str, ...], int]:
        address = ip_address(self.ip)
        return address.version, int(address), self.gpus, self.index


def seat_ranks(seats: Sequence[Seat]) -> list[Seat]:
    """Return the seats in rank order: by host address, so that neighbours in rank share a host where they can.

    The order depends on addresses alone, so it is the same after a restart on the same machines.
    """
    return sorted(seats, key=lambda seat: seat.order)


def one_host(seats: Sequence[Seat]) -> bool:
    """Return whether all ranks are on one machine."""
    return len({seat.ip for seat in seats}) == 1


def environments(seats: Sequence[Seat], port: int, threads: int) -> list[dict[str, str]]:
    """Return the environment of each rank, for ``seats`` in rank order and rank 0's ``port``.

    Ranks on one machine talk over the loopback device, so they need no network. On several machines gloo and NCCL
    choose their interfaces, unless the user's environment does (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME).
    """
    alone = one_host(seats)
    found = []
    for rank, seat in enumerate(seats):
        local = [other for other in seats if other.ip == seat.ip]
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(seats)),
            "LOCAL_RANK": str(local.index(seat)),
            "LOCAL_WORLD_SIZE": str(len(local)),
            "MASTER_ADDR": LOOPBACK if alone else seats[0].ip,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
        }
        if alone and (device := loopback_device()):
            environment["GLOO_SOCKET_IFNAME"] = device
        if devices := [gpu for other in local for gpu in other.gpus]:
            # All GPUs of the machine's ranks, so that LOCAL_RANK indexes them and NCCL sees its peers.
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        found.append(environment)
    return found


def loopback_device() -> str:
    """Return the name of this machine's loopback device, or an empty string."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "")


def hold_port() -> socket.socket:
    """Return a socket that holds a free TCP port for the rendezvous store of this process.

    The socket is bound but does not listen, and allows reuse: the store, which allows it too, can bind and listen on
    the same port while nothing that asks the system for a free port is given it.
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("", 0))
    return holder


def apply(environment: dict[str, str]) -> None:
    """Set the rank's variables in this process; what the user has chosen for gloo's device stays."""
    for name, value in environment.items():
        if name == "GLOO_SOCKET_IFNAME":
            os.environ.setdefault(name, value)
        else:
            os.environ[name] = value

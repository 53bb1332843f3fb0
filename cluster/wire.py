"""A machine's links, disk, clock and GPUs: short measurements with sockets, files and the driver's tool. No Ray."""

import os
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PIECE = bytes(2**20)
SENT = bytes(2**16)  # little enough to pass a very slow link before the timeout
COUNT = struct.Struct("!Q")
TIMEOUT_SEC = 5.0
DRIVER_SEC = 5.0


class Receiver:
    """Takes whatever one sender sends, and answers with how many bytes that were."""

    def __init__(self) -> None:
        self._server = socket.create_server(("", 0))
        self._server.settimeout(TIMEOUT_SEC)
        self.port: int = self._server.getsockname()[1]
        threading.Thread(target=self._receive, daemon=True).start()

    def _receive(self) -> None:
        with self._server, suppress(OSError):
            connection, _ = self._server.accept()
            with connection:
                connection.settimeout(TIMEOUT_SEC)
                buffer, received = bytearray(len(PIECE)), 0
                while taken := connection.recv_into(buffer):
                    received += taken
                connection.sendall(COUNT.pack(received))


def bandwidth(host: str, port: int, seconds: float) -> float:
    """Send to the receiver at ``host`` for ``seconds``; return the bytes a second that have arrived there.

    Raises:
        OSError: it cannot be reached, or does not answer.
    """
    with socket.create_connection((host, port), TIMEOUT_SEC) as connection:
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            connection.sendall(SENT)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(COUNT.size, socket.MSG_WAITALL)
        return COUNT.unpack(answer)[0] / (time.perf_counter() - started)


@dataclass(frozen=True)
class Disk:
    """What writing to a folder is like."""

    free: int  # bytes
    rate: float  # bytes a second, written and synced
    sync_sec: float  # for one small file


def disk(folder: Path, seconds: float, most: int = 2**26) -> Disk:
    """Write for about ``seconds`` or ``most`` bytes into a file that is removed again.

    Raises:
        OSError: the folder takes no file.
    """
    status = os.statvfs(folder)
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        file.write(b"x")
        os.fsync(file.fileno())
        small, written = time.perf_counter() - started, 0
        started = time.perf_counter()
        while written < most and time.perf_counter() - started < seconds:
            written += file.write(PIECE)
            os.fsync(file.fileno())
        return Disk(status.f_bavail * status.f_frsize, written / (time.perf_counter() - started), small)


def gpu_names() -> list[str]:
    """Name, memory and driver of every GPU of this machine, as the driver's tool tells them."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=DRIVER_SEC, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.replace(",", "") for line in done.stdout.splitlines() if line.strip()]


def clock_offset(theirs: Callable[[], float], tries: int = 5) -> tuple[float, float]:
    """Return by how many seconds another machine's clock is ahead of this one's, and how far that may be off.

    ``theirs`` asks for its time; of several answers the quickest counts.
    """
    best = (0.0, float("inf"))
    for _ in range(tries):
        sent = time.time()
        told = theirs()
        half = (time.time() - sent) / 2
        if half < best[1]:
            best = (told - sent - half, half)
    return best

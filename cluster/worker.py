"""The actor that is one rank's process. It knows nothing of training: it runs a function by its dotted name."""

import faulthandler
import os
import pickle
import socket
import threading
import time
import traceback
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from cluster import logs, rendezvous
from cluster.names import resolve
from cluster.processes import STACK_SIGNAL
from conf.errors import RankLost, SundogError

MAX_EVENTS = 100_000  # kept for a driver that does not come for them; the oldest go first


class RankControl:
    """What a rank function gets to talk to its gang (the Control protocol of the trainers).

    ``emit`` only appends to a queue, so a step never waits for the driver.
    """

    def __init__(self, keep_events: bool) -> None:
        self._keep = keep_events
        self._events: deque[dict[str, Any]] = deque(maxlen=MAX_EVENTS)
        self._arrived = threading.Condition()
        self._stop = threading.Event()
        self._progress = time.monotonic()

    def emit(self, event: dict[str, Any]) -> None:
        self._progress = time.monotonic()
        if self._keep:
            with self._arrived:
                self._events.append(event)
                self._arrived.notify()

    def stopping(self) -> bool:
        self._progress = time.monotonic()
        return self._stop.is_set()

    def idle(self) -> float:
        """Seconds since the rank function last used this control: it does at least once a step."""
        return time.monotonic() - self._progress

    def stop(self) -> None:
        self._stop.set()

    def take(self, timeout: float) -> list[dict[str, Any]]:
        """Return the queued events; wait up to ``timeout`` seconds for the first."""
        with self._arrived:
            if not self._events:
                self._arrived.wait(timeout)
            taken = list(self._events)
            self._events.clear()
            return taken


@dataclass(frozen=True)
class Outcome:
    """How a rank function ended: a value, a user error, or the text of any other exception."""

    value: Any = None
    error: SundogError | None = None
    message: str = ""
    trace: str = ""
    time: float = 0.0  # seconds since the epoch

    @property
    def ok(self) -> bool:
        return self.error is None and not self.message


class Rank:
    """One rank. Its methods run in threads beside each other: ``run`` for the whole job, the others any time."""

    def __init__(self) -> None:
        self._control = RankControl(keep_events=False)
        self._held: socket.socket | None = None

    def seat(self, index: int) -> rendezvous.Seat:
        gpus = tuple(str(gpu) for gpu in ray.get_runtime_context().get_accelerator_ids().get("GPU", []))
        node = ray.get_runtime_context().get_node_id()
        return rendezvous.Seat(index, ray.util.get_node_ip_address(), socket.gethostname(), os.getpid(), gpus, node)

    def hold_port(self) -> int:
        """Reserve the rendezvous port; rank 0 holds it while it lives."""
        self._held = rendezvous.hold_port()
        return self._held.getsockname()[1]

    def prepare(self, environment: dict[str, str], folder: str, log_dir: str) -> None:
        """Become a rank: environment, working folder, log. Before anything that reads the environment is imported."""
        rendezvous.apply(environment)
        with suppress(OSError):
            os.chdir(folder)  # relative paths mean the same as in the command, where the folder exists
        rank = int(environment["RANK"])
        self._control = RankControl(keep_events=rank == 0)
        if log_dir:
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            logs.redirect(
                logs.log_path(Path(log_dir), rank), f"rank {rank} pid {os.getpid()} on {socket.gethostname()} {started}"
            )
        # In C and without the interpreter's lock: it answers wherever the rank hangs.
        faulthandler.register(STACK_SIGNAL, file=2, all_threads=True)

    def run(self, function: str, config: Any) -> Outcome:
        """Call ``function(config, control)`` and return how it ended; only a dying process does not return."""
        try:
            value = resolve(function)(config, self._control)
            pickle.dumps(value)
            return Outcome(value=value, time=time.time())
        except RankLost as error:  # a symptom: the rank that it names, or its node, is what failed
            return Outcome(message=str(error), time=time.time())
        except SundogError as error:
            return Outcome(error=error, time=time.time())
        except BaseException as error:
            trace = traceback.format_exc()
            os.write(2, trace.encode())
            message = traceback.format_exception_only(error)[-1].strip()
            return Outcome(message=message or type(error).__name__, trace=trace, time=time.time())

    def poll(self, timeout: float) -> list[dict[str, Any]]:
        return self._control.take(timeout)

    def cancel(self) -> None:
        self._control.stop()

    def idle(self) -> float:
        return self._control.idle()

"""What a rank may ask of, and tell to, whoever started it: a Ray actor, torchrun or a test."""

import signal
import threading
from types import FrameType
from typing import Any, Protocol, Self

from trainers import console

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Control(Protocol):
    """The two ways between a rank and its starter."""

    def emit(self, event: dict[str, Any]) -> None:
        """Hand over an event; ``event["kind"]`` is metrics, log, checkpoint or samples. Rank 0 emits, others do not."""
        ...

    def stopping(self) -> bool:
        """Return whether the run should checkpoint and end. May differ between ranks; they agree once a step.

        Asking is also the sign of progress that a watchdog waits for.
        """
        ...


class LocalControl:
    """A control for a rank without a supervisor: signals ask to stop, events are printed.

    As a context manager it catches SIGTERM, SIGINT and SIGUSR1 (in the main thread; elsewhere Python forbids it). The
    first signal asks to stop after the current step; a second one has the signal's default effect. Handlers are put
    back on exit.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._stop = threading.Event()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop.set()
        for each in STOP_SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    def stop(self) -> None:
        """Ask to stop, as a signal does."""
        self._stop.set()

    def emit(self, event: dict[str, Any]) -> None:
        if not self.quiet:
            console.show(event)

    def stopping(self) -> bool:
        return self._stop.is_set()

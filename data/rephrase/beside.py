"""What runs in threads beside an event loop: reading ahead of it, and keeping what it found."""

import asyncio
import gc
import itertools
import queue
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Generic, TypeVar

T = TypeVar("T")
SWITCH_SEC = 0.0005
COLLECT_EVERY = 100_000  # new objects; the young ones are walked in some ms


@contextmanager
def prompt_loop() -> Iterator[None]:
    """Lets nothing else in this process stop an event loop for long; what was set before is set again afterwards.

    A full collection walks all that was imported (0.1 s, many times a minute), and Python lets a thread that wants to
    run wait for 5 ms, once for each statement of a database. After such a stop all answers that waited come at once,
    and again 0.2 s later, so that every one of them waits for the others (91 % of 256 slots busy; 97 % without).
    """
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY, *thresholds[1:])
    sys.setswitchinterval(SWITCH_SEC)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()


class Ahead(Generic[T]):
    """Items of an iterator that are read in a thread, ``depth`` at once, before they are due."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[T] = deque()
        self._reading: asyncio.Task[None] | None = None
        self._ended = False

    async def take(self) -> T | None:
        """The next item, None behind the last one. Raises what the iterator raises."""
        while True:
            if self._reading is not None and self._reading.done():
                self._reading.result()
                self._reading = None
            if self._reading is None and not self._ended and len(self._ready) < self._depth:
                self._reading = asyncio.create_task(self._read())
            if self._ready:
                return self._ready.popleft()
            if self._reading is None:
                return None
            await asyncio.wait([self._reading])

    async def _read(self) -> None:
        found = await asyncio.to_thread(lambda: list(itertools.islice(self._items, self._depth)))
        self._ready.extend(found)
        self._ended = len(found) < self._depth


class Keeper(Generic[T]):
    """A thread that calls ``keep`` with what was put since its last call, in that order. Use as a context."""

    def __init__(self, keep: Callable[[list[T]], None]) -> None:
        self._keep = keep
        self._waiting: queue.SimpleQueue[tuple[T, asyncio.Future[None]] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="keeper")

    def __enter__(self) -> "Keeper[T]":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Waits until all is kept, also what nobody waits for any more. Raises what ``keep`` raised."""
        self._waiting.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    async def put(self, item: T) -> None:
        """Returns when the item is kept. Raises what ``keep`` raised."""
        if self._error is not None:
            raise self._error
        kept = asyncio.get_running_loop().create_future()
        self._waiting.put((item, kept))
        await kept

    def _run(self) -> None:
        ended = False
        while not ended:
            group = [self._waiting.get()]
            while not self._waiting.empty():  # only this thread takes
                group.append(self._waiting.get())
            ended = None in group
            found = [waiting for waiting in group if waiting is not None]
            if self._error is None and found:
                try:
                    self._keep([item for item, _ in found])
                except BaseException as error:
                    self._error = error
            if futures := [kept for _, kept in found]:
                with suppress(RuntimeError):  # a closed loop: nobody waits any more
                    futures[0].get_loop().call_soon_threadsafe(_settle, futures, self._error)


def _settle(kept: list[asyncio.Future[None]], error: BaseException | None) -> None:
    for future in kept:
        if future.done():  # cancelled
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
